"""Chats as ids, and many of them packed into rows of fixed length.

Shapes: T tokens of a sample, R rows, L length of a row, M images in order of appearance, N positions, D depth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError

IGNORE = -100


@dataclass
class ChatTokens:
    """One sample for the LLM: N placeholders stand for each picture."""

    ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T]: what the assistant says, -100 elsewhere
    codes: DualCodes | None  # of the M pictures
    draw_semantic: Tensor  # bool [M]: False where a drawn picture's semantic codes are hidden


@dataclass
class PackedBatch:
    """Samples one behind the other; position numbers restart with each, and attention stays within it."""

    input_ids: Tensor  # int64 [R, L]
    position_ids: Tensor  # int64 [R, L]
    labels: Tensor  # int64 [R, L]
    codes: DualCodes | None
    draw_semantic: Tensor  # bool [M]
    useful: float  # share of the R * L places that are no padding
    samples: int

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved = {n: getattr(self, n).to(device) for n in ("input_ids", "position_ids", "labels", "draw_semantic")}
        codes = None if self.codes is None else self.codes.to(device)
        return PackedBatch(**moved, codes=codes, useful=self.useful, samples=self.samples)

    @property
    def inputs(self) -> dict:
        """Arguments of the model's forward."""
        names = ("input_ids", "position_ids", "labels", "codes", "draw_semantic")
        return {name: getattr(self, name) for name in names}


def pack(samples: list[ChatTokens], length: int, fill: int) -> PackedBatch:
    """Put samples into as few rows as first-fit, longest first, gives; `fill` is the id of padding.

    Padding is a sample of its own at the end of a row. Raises UserError for a sample longer than a row.
    """
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].ids), i))
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = len(samples[i].ids)
        if size > length:
            raise UserError(f"a sample has {size} tokens, rows hold {length}: raise --data.length to at least {size}")
        row = next((r for r, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= size
    ids = torch.full((len(rows), length), fill)
    labels = torch.full((len(rows), length), IGNORE)
    places = torch.zeros_like(ids)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            size = len(samples[i].ids)
            ids[r, at : at + size] = samples[i].ids
            labels[r, at : at + size] = samples[i].labels
            places[r, at : at + size] = torch.arange(size)
            labels[r, at] = IGNORE  # nothing before a sample's first token predicts it
            at += size
        places[r, at:] = torch.arange(length - at)
    flat = [samples[i] for members in rows for i in members]
    codes = [s.codes for s in flat if s.codes is not None]
    return PackedBatch(
        input_ids=ids,
        position_ids=places,
        labels=labels,
        codes=DualCodes.cat(codes) if codes else None,
        draw_semantic=torch.cat([s.draw_semantic for s in flat]),
        useful=1 - sum(room) / (len(rows) * length),
        samples=len(samples),
    )
