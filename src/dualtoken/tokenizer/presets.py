"""Models by name: the bundled miniature, the paper's shapes, and how a directory or a name is opened.

A shape by name is a recipe of `train-tokenizer` that names a backbone: `recipes/siglip-l-256.yaml` and so on.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
RECIPES = Path(__file__).parents[1] / "recipes"
BUNDLED = {"mini": CHECKPOINTS / "mini"}


def _directory(model: str, part: str, option: str, kind: str) -> Path:
    if model in BUNDLED:
        return BUNDLED[model] / part
    if not Path(model).exists():
        raise UserError(f"{option} {model}: no such directory, and no preset (presets: {', '.join(BUNDLED)})")
    return check_directory(model, option, kind)


def tokenizer_directory(model: str, option: str = "--model") -> Path:
    """Directory of a tokenizer given by preset or path. Raises UserError where it holds none."""
    return _directory(model, "tokenizer", option, DualTokenVisionConfig.model_type)


def encoder_directory(model: str, option: str = "--encoder") -> Path:
    """Directory of an image-text encoder given by preset or path. Raises UserError where it holds none."""
    return _directory(model, "encoder", option, ImageTextConfig.model_type)


def open_tokenizer(model: str, option: str = "--model") -> DualTokenVisionTokenizer:
    """The tokenizer of a preset or directory, in evaluation mode."""
    return DualTokenVisionTokenizer.from_pretrained(tokenizer_directory(model, option)).eval()


def open_encoder(model: str, option: str = "--encoder") -> ImageTextEncoder:
    """The image-text encoder of a preset or directory, in evaluation mode."""
    return ImageTextEncoder.from_pretrained(encoder_directory(model, option)).eval()


@lru_cache
def shapes() -> dict[str, dict[str, Any]]:
    """Recipes that describe a tokenizer, by name."""
    read = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*.yaml"))}
    return {name: recipe for name, recipe in read.items() if {"backbone", "pixel"} <= set(recipe)}


def shape_config(name: str) -> DualTokenVisionConfig:
    """The tokenizer's config of a shape by name."""
    parts = ("backbone", "pixel", "semantic", "decoder", "pixel_encoder")
    return DualTokenVisionConfig(*(shapes()[name].get(part) for part in parts))


def meta_tokenizer(name: str) -> DualTokenVisionTokenizer:
    """The tokenizer of a shape by name on the meta device: shapes without values."""
    with torch.device("meta"):
        return DualTokenVisionTokenizer(shape_config(name))


def scale_of(tokenizer: DualTokenVisionTokenizer) -> str | None:
    """ "mini" for the bundled miniature's backbone, trained by whomever, "full" for that of a shape, else None."""

    def kind(backbone: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return backbone["name"], backbone.get("overrides") or {}

    own, mini = kind(tokenizer.config.backbone), DualTokenVisionConfig.from_pretrained(tokenizer_directory("mini"))
    if own == kind(mini.backbone):
        return "mini"
    return "full" if own in [kind(recipe["backbone"]) for recipe in shapes().values()] else None


def fitting_shape(width: int, layers: int, positions: int, class_tokens: int = 0) -> str | None:
    """The first shape by name whose backbone has these sizes, None if there is none."""
    for name in shapes():
        made, wanted = meta_tokenizer(name), (width, layers, positions, class_tokens)
        sizes = (made.backbone.width, made.backbone.layers, made.positions, made.backbone.prefix)
        if sizes == wanted and made.pixel_encoder is None:
            return name
    return None
