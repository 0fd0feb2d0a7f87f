"""Datasets of a recipe as batches, and codes for the pictures that come with them."""

from dataclasses import replace
from typing import Any

import torch

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import Picture
from dualtoken.data.collate import PackedBatch
from dualtoken.data.sources import SourceConfig, open_source
from dualtoken.data.stream import ChatStream
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.training.stored_codes import encode_pictures


def open_stream(
    configs: list[SourceConfig], mixture: dict[str, float], size: int, tokenizer: str | None = None, **options: Any
) -> ChatStream:
    """The sources with pictures of side `size` and stored codes of a tokenizer (None = any); `options` of ChatStream.

    Weights are the mixture's where it names sources (those it leaves out are not read), else the sources' own.
    Raises UserError where the mixture names some sources and something else.
    """
    named = name_sources(configs)
    weights = {name: config.weight for name, config in named.items()}
    if any(name in named for name in mixture):
        unknown = [name for name in mixture if name not in named]
        if unknown:
            raise UserError(f"mixture {mixture}: no source {', '.join(unknown)}; there are {', '.join(named)}")
        weights = {name: mixture.get(name, 0.0) for name in named}
    sources = {name: open_source(config, size, tokenizer) for name, config in named.items()}
    return ChatStream(sources, weights, **options)


def name_sources(configs: list[SourceConfig]) -> dict[str, SourceConfig]:
    """Sources by name, or path without one; a dataset that is read in several ways is "NAME", "NAME 2", ..."""
    named: dict[str, SourceConfig] = {}
    for config in configs:
        name = config.name or config.path
        number = sum((other.name or other.path) == name for other in named.values()) + 1
        named[name if number == 1 else f"{name} {number}"] = config
    return named


def with_codes(tokenizer: DualTokenVisionTokenizer, batch: PackedBatch) -> PackedBatch:
    """The batch with codes of all its pictures: those that came as pixels are encoded."""
    unseen = batch.unseen
    if unseen is None:
        return batch
    pictures: list[Picture] = []
    for image, before in zip(unseen.images, unseen.before.tolist(), strict=True):
        pictures.append(Picture("unseen", image=image, edited=pictures[before] if before >= 0 else None))
    made = encode_pictures(tokenizer, pictures)
    known = torch.ones(len(batch.draw_semantic), dtype=torch.bool)
    known[unseen.places] = False
    found = {}
    for name in ("pixel", "semantic"):
        new = getattr(made, name)[:, -tokenizer.positions :]  # without a class token, which the LLM never sees
        codes = new.new_empty((len(known), *new.shape[1:]))
        codes[unseen.places] = new
        if batch.codes is not None:
            codes[known] = getattr(batch.codes, name)[:, -tokenizer.positions :]
        found[name] = codes
    return replace(batch, codes=DualCodes(**found), unseen=None)
