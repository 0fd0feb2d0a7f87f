"""Chats as ids, and many of them packed into rows of one width.

Shapes: T tokens of a sample, R rows, L width of a row, M images in order of appearance, N positions, D depth, K images
that came as pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import Picture

IGNORE = -100
TRIES = 8  # numbers of rows among which the one with the least padding is taken,
ENOUGH = 1.005  # or the first with no more than so many places a token


@dataclass
class ChatTokens:
    """One sample for the LLM: N placeholders stand for each picture, which has its codes here or is in `pictures`."""

    ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T]: what the assistant says, -100 elsewhere
    codes: DualCodes | None  # of the M pictures
    draw_semantic: Tensor  # bool [M]: False where a drawn picture's semantic codes are hidden
    pictures: list[Picture] = field(default_factory=list)  # the M pictures, in place of `codes`


@dataclass
class Unseen:
    """Pictures of a batch that came as pixels; who has the vision tokenizer makes their codes."""

    images: Tensor  # uint8 [K, 3, S, S]
    places: Tensor  # int64 [K]: which of the batch's M pictures each is
    before: Tensor  # int64 [K]: which of the K it was made of by an edit, -1 = of none


@dataclass
class PackedBatch:
    """Samples one behind the other; position numbers restart with each, and attention stays within it."""

    input_ids: Tensor  # int64 [R, L]
    position_ids: Tensor  # int64 [R, L]
    labels: Tensor  # int64 [R, L]
    codes: DualCodes | None  # of the M pictures, but for those that are unseen
    draw_semantic: Tensor  # bool [M]
    useful: float  # share of the R * L places that are no padding
    samples: int
    unseen: Unseen | None = None

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on a device, but for the pixels, which go there as they are encoded."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unseen"}
        return replace(self, **{n: v.to(device) for n, v in moved.items() if hasattr(v, "to")})

    @property
    def inputs(self) -> dict:
        """Arguments of the model's forward."""
        names = ("input_ids", "position_ids", "labels", "codes", "draw_semantic")
        return {name: getattr(self, name) for name in names}


def pack(samples: list[ChatTokens], length: int, fill: int, round_to: int = 1) -> PackedBatch:
    """Put samples into rows as equally full as can be, as wide as the fullest; `fill` is the id of padding.

    Padding is a sample of its own at the end of a row.

    Args:
        length: the widest a row may be.
        round_to: widths are multiples of it, so that few shapes occur; at most `length`.
    Raises UserError for a sample longer than a row.
    """
    sizes = [len(s.ids) for s in samples]
    if max(sizes) > length:
        raise UserError(
            f"a sample has {max(sizes)} tokens, rows hold {length}: raise --data.length to at least {max(sizes)}"
        )
    rows = spread(sizes, length, round_to)
    width = _width(sizes, rows, length, round_to)
    ids = torch.full((len(rows), width), fill)
    labels = torch.full((len(rows), width), IGNORE)
    places = torch.zeros_like(ids)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            size = sizes[i]
            ids[r, at : at + size] = samples[i].ids
            labels[r, at : at + size] = samples[i].labels
            places[r, at : at + size] = torch.arange(size)
            labels[r, at] = IGNORE  # nothing before a sample's first token predicts it
            at += size
        places[r, at:] = torch.arange(width - at)
    flat = [samples[i] for members in rows for i in members]
    pictures = [picture for s in flat for picture in s.pictures]
    codes = [owner.codes for owner in (*flat, *pictures) if owner.codes is not None]
    return PackedBatch(
        input_ids=ids,
        position_ids=places,
        labels=labels,
        codes=DualCodes.cat(codes) if codes else None,
        draw_semantic=torch.cat([s.draw_semantic for s in flat]),
        useful=sum(sizes) / ids.numel(),
        samples=len(samples),
        unseen=_unseen(pictures),
    )


def spread(sizes: list[int], length: int, round_to: int = 1) -> list[list[int]]:
    """Which samples are in which row: of the smallest numbers of rows that do, the one with the fewest places."""
    found: list[tuple[int, list[list[int]]]] = []
    for count in range(-(-sum(sizes) // length), len(sizes) + 1):
        rows = _balance(sizes, count)
        if _fullest(sizes, rows) <= length:
            found.append((count * _width(sizes, rows, length, round_to), rows))
            if len(found) == TRIES or found[-1][0] <= ENOUGH * sum(sizes):
                break
    return min(found, key=lambda pair: pair[0])[1]


def _balance(sizes: list[int], count: int) -> list[list[int]]:
    """`count` rows of nearly equal sums: the longest sample first, each into the emptiest row; then the fullest row
    gives a sample away, or for a shorter one, for as long as that helps."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = filled.index(min(filled))
        rows[row].append(i)
        filled[row] += sizes[i]
    while True:
        full = filled.index(max(filled))
        found = max(_exchanges(sizes, rows, filled, full), key=lambda e: e.gain, default=None)
        if found is None:
            return rows
        for source, target, i in ((full, found.row, found.given), (found.row, full, found.taken)):
            if i is not None:
                rows[source].remove(i)
                rows[target].append(i)
                filled[source] -= sizes[i]
                filled[target] += sizes[i]


@dataclass(frozen=True)
class Exchange:
    """What the fullest row gives to another and takes of it, and by how much the fuller of the two shrinks."""

    gain: int
    row: int
    given: int
    taken: int | None


def _exchanges(sizes: list[int], rows: list[list[int]], filled: list[int], full: int) -> Iterator[Exchange]:
    for row, members in enumerate(rows):
        for given in rows[full]:
            for taken in (None, *members):
                moved = sizes[given] - (0 if taken is None else sizes[taken])
                gain = min(moved, filled[full] - filled[row] - moved)
                if gain > 0:  # never within the fullest row itself
                    yield Exchange(gain, row, given, taken)


def _fullest(sizes: list[int], rows: list[list[int]]) -> int:
    return max(sum(sizes[i] for i in row) for row in rows)


def _width(sizes: list[int], rows: list[list[int]], length: int, round_to: int) -> int:
    return min(length, -(-_fullest(sizes, rows) // round_to) * round_to)


def _unseen(pictures: list[Picture]) -> Unseen | None:
    """Those of the pictures that have no codes, None where all have. Raises UserError for one without pixels."""
    bare = [i for i, picture in enumerate(pictures) if picture.codes is None]
    if not bare:
        return None
    number: dict[str, int] = {}
    before = []
    for k, picture in enumerate(pictures[i] for i in bare):
        if picture.image is None:
            raise UserError(f"picture {picture.name} has neither pixels nor codes")
        before.append(-1 if picture.edited is None else number.get(picture.edited.name, -1))
        number[picture.name] = k
    images = torch.stack([pictures[i].image for i in bare])
    return Unseen(images, torch.tensor(bare), torch.tensor(before))
