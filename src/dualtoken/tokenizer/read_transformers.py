"""Pretrained towers in the format of transformers: what `save_pretrained` of its SigLIP and CLIP models wrote."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.backbone import BackboneConfig, map_transformers_keys
from dualtoken.tokenizer.encoder import ImageTextConfig
from dualtoken.tokenizer.weights import (
    CLIP_VIT,
    HALF,
    OPENAI_MEAN,
    OPENAI_STD,
    SIGLIP_VIT,
    Pretrained,
    colors,
    first_line,
    logits,
    mismatch,
)

KINDS = ("siglip", "siglip_vision_model", "siglip2", "clip")  # model_type of config.json
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # its name, timm's name


def read_transformers(path: Path, who: str) -> Pretrained:
    """A directory of SiglipModel, Siglip2Model, CLIPModel or SiglipVisionModel, read by transformers itself."""
    return from_transformers(_auto_model(path, who), path, who)


def from_transformers(model: nn.Module, path: Path | None, who: str) -> Pretrained:
    """What a model of transformers holds; `path` is its directory, for preprocessing and text tokenizer."""
    whole = model.config
    vision = getattr(whole, "vision_config", whole)
    clip = whole.model_type == "clip"
    image = _image_tower(model, who)
    if clip:
        image["head.weight"] = model.visual_projection.weight.detach()
        image["head.bias"] = torch.zeros(whole.projection_dim)
    if vision.hidden_act not in ACTIVATIONS:
        raise UserError(f"{who}: activation {vision.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
    side = vision.image_size if hasattr(vision, "image_size") else math.isqrt(vision.num_patches) * vision.patch_size
    backbone = BackboneConfig(
        CLIP_VIT if clip else SIGLIP_VIT,
        {
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            # timm rounds embed_dim x mlp_ratio down
            "mlp_ratio": (vision.intermediate_size + 0.01) / vision.hidden_size,
            "img_size": side,
            "patch_size": vision.patch_size,
            "act_layer": ACTIVATIONS[vision.hidden_act],
        },
        projection=whole.projection_dim if clip else 0,
        **colors(*_preprocessor(path, (OPENAI_MEAN, OPENAI_STD) if clip else (HALF, HALF))),
    )
    state = {f"backbone.vit.{k}": v for k, v in image.items()}
    if vision is whole:  # the image tower alone
        return Pretrained(ImageTextConfig(asdict(backbone)), state, path)
    text = whole.text_config
    prefix = "text.text_model." if clip else "text."
    state |= {f"{prefix}{k}": v for k, v in model.text_model.state_dict().items()}
    if clip:
        state["text.text_projection.weight"] = model.text_projection.weight.detach()
    tower = {
        "kind": "clip" if clip else "siglip",
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "config": text.to_dict() | ({"projection_dim": whole.projection_dim} if clip else {}),
    }
    state |= logits(model.logit_scale, getattr(model, "logit_bias", None))
    return Pretrained(ImageTextConfig(asdict(backbone), tower), state, path)


def _auto_model(path: Path, who: str) -> nn.Module:
    """The model of a directory with all its weights. Raises UserError for a missing or mismatching one."""
    options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModel.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{who}: cannot be read ({first_line(error)})") from None
    for key, stored, needed in sorted(info["mismatched_keys"]):
        raise UserError(mismatch(who, key, stored, needed))
    for key in sorted(info["missing_keys"]):
        raise UserError(f"{who}: its weights have no {key}")
    return model


def _preprocessor(path: Path | None, default: tuple[tuple, tuple]) -> tuple[Iterable[float], Iterable[float]]:
    """Mean and std that a directory's image processor uses."""
    file = path / "preprocessor_config.json" if path is not None else None
    written = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    return written.get("image_mean", default[0]), written.get("image_std", default[1])


def _image_tower(model: nn.Module, who: str) -> dict[str, Tensor]:
    """The image tower of a transformers model under timm's names."""
    tower = getattr(model, "vision_model", model)
    state = dict(tower.state_dict())
    patches = "embeddings.patch_embedding.weight"
    if state[patches].ndim == 2:  # SigLIP 2 takes patches [h w c] as rows
        side = tower.config.patch_size
        state[patches] = state[patches].unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    try:
        return map_transformers_keys(state, tower.config.num_hidden_layers)
    except KeyError as error:
        raise UserError(f"{who}: its weights have no {error}") from None
