"""What the analyses look at: pictures in random order, the layers of any backbone, both branches of any tokenizer.

Shapes: B pictures of a batch, S side in pixels, N positions, C width.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualtoken.core.errors import UserError
from dualtoken.core.images import FIT, to_float
from dualtoken.data.images import Batch, DataConfig, Sample, Source, open_source, read_in_order
from dualtoken.tokenizer.backbone import Backbone
from dualtoken.tokenizer.initial import open_backbone
from dualtoken.tokenizer.presets import BUNDLED, open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

SIDE = 96  # pixels of pictures that are held to be shown


class Shuffled:
    """A source in random order, so that every batch is a sample of the whole; an endless one is as it is."""

    def __init__(self, source: Source, seed: int):
        self.source, self.endless, self.classes = source, source.endless, source.classes
        self.order = None if source.endless else np.random.default_rng(seed).permutation(len(source))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index if self.order is None else int(self.order[index])]


class Reading:
    """The pictures of a command: batches as often as asked for, in the same order, and what to say of them.

    Raises UserError for data that are not there, and for numbers below 1.
    """

    def __init__(self, data: str, size: int, images: int, batch_size: int, seed: int):
        self.data, self.size, self.batch_size, self.seed = data, size, batch_size, seed
        self.source = Shuffled(open_source(DataConfig(data), size, "test", "--data"), seed)
        self.most = images if self.source.endless else min(images, len(self.source))
        self.used, self.skipped = 0, []

    def __iter__(self) -> Iterator[Batch]:
        """All pictures."""
        self.used, self.skipped = 0, []
        for batch in read_in_order(self.source, self.most, self.batch_size, self.skipped):
            self.used += len(batch.images)
            yield batch

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was measured, once the pictures were read."""
        order = f"at random from seed {self.seed}"
        return {
            "data": self.data, "images": self.used, "size": self.size, "resize": FIT, "order": order,
            "skipped": self.skipped,
        }  # fmt: skip


class Branches:
    """Pixel and semantic features of one model: of its layers, or of its codes."""

    def __init__(self, model: str, quantized: bool, option: str):
        is_tokenizer = model in BUNDLED or kind_of(model) == DualTokenVisionConfig.model_type
        if quantized and not is_tokenizer:
            raise UserError(f"--quantized: {model} is no tokenizer and has no codes; give one, or leave it out")
        self.tokenizer = tokenizer_of(model, option) if is_tokenizer else None
        self.backbone = self.tokenizer.backbone if is_tokenizer else backbone_of(model, option)
        self.quantized, self.size = quantized, self.backbone.image_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [B, 3, S, S] -> pixel and semantic features [B, N, C] each."""
        backbone, tokenizer = self.backbone, self.tokenizer
        images = to_float(images.to(next(backbone.parameters()).device))
        if self.quantized:
            pixel, semantic = tokenizer.features(tokenizer.encode(images))
            return pixel, semantic[:, backbone.prefix :]
        layers = backbone.pixel_layer, backbone.semantic_layer
        wanted = tuple(sorted(set(layers)))
        found = dict(zip(wanted, backbone.taps(images, wanted), strict=True))
        pixel, semantic = (found[layer][:, backbone.prefix :] for layer in layers)
        own = tokenizer.pixel_encoder if tokenizer is not None else None
        return (pixel if own is None else own(images)), semantic


def kind_of(model: str) -> str | None:
    """The model_type in a directory's config.json, None where there is none."""
    try:
        return json.loads((Path(model) / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        return None


def tokenizer_of(model: str, option: str = "--model") -> DualTokenVisionTokenizer:
    """A tokenizer by preset or directory, on its device."""
    return open_tokenizer(model, option).to(device())


def backbone_of(model: str, option: str) -> Backbone:
    """The backbone of a tokenizer, or of any encoder (`tokenizer/pretrained.py`), in evaluation mode on its device."""
    if kind_of(model) == DualTokenVisionConfig.model_type:
        return tokenizer_of(model, option).backbone
    return open_backbone(model, option)


def small(pictures: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, S, S] at SIDE px, if they are larger, to be held and shown."""
    if pictures.shape[-1] <= SIDE:
        return pictures
    small = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def layers_of(listed: str | None, backbone: Backbone) -> tuple[int, ...]:
    """Numbers of layers by option --layers, ascending; None = the two that are tapped."""
    if listed is None:
        return tuple(sorted({backbone.pixel_layer, backbone.semantic_layer}))
    parts = [part.strip() for part in listed.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= backbone.layers for part in parts):
        raise UserError(f"--layers {listed}: give numbers from 1 to {backbone.layers} with commas between them")
    return tuple(sorted({int(part) for part in parts}))


def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
