"""What the pages of the web app show of a model at work: words and pictures while they grow.

Every function gives what there is so far, again and again, and at last the whole; closing it, or setting its `stop`,
ends the work.

Shapes: B images, n positions drawn of N, D depth.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers.generation.streamers import BaseStreamer

from dualtoken.app.live import Report, live
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_picture
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant, Chat, user

Stop = threading.Event | None
BOTH, PIXEL_ONLY = "with semantic codes", "pixel codes alone"
LARGEST = 16  # pictures asked for at once
EMPTY = 0.75  # gray of what is not drawn yet, in [-1, 1]


@dataclass(frozen=True)
class Sampling:
    """What a page lets a person choose of drawing.

    Args: guidance: 1 = none; pixel, semantic: temperature of each head, 0 = the likeliest code; seed: of the first
        picture.
    """

    guidance: float = 3.0
    pixel: float = 1.0
    semantic: float = 1.0
    seed: int = 0

    def config(self, assistant: Assistant, semantic_codes: bool = True) -> DrawConfig:
        """The model's way of drawing with these choices. Raises UserError for what cannot be."""
        own = assistant.model.draw_config
        return DrawConfig(
            guidance=self.guidance,
            pixel=replace(own.pixel, temperature=self.pixel),
            semantic=replace(own.semantic, temperature=self.semantic),
            semantic_codes=own.semantic_codes and semantic_codes,
        )


@dataclass(frozen=True)
class Shown:
    """Pictures so far, by how they are drawn, and how far that is: `done` of `total` positions."""

    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    done: int = 0
    total: int = 1


@dataclass(frozen=True)
class Told:
    """A story so far: finished parts, the picture being drawn (None between pictures), and its number from 1."""

    parts: list[str | Image.Image] = field(default_factory=list)
    drawing: Image.Image | None = None
    number: int = 0


class _Words(BaseStreamer):
    """Reports the words of a reply as they are written."""

    def __init__(self, assistant: Assistant, report: Report):
        self.assistant, self.report, self.ids = assistant, report, []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()
        self.report(self.assistant.processor.decode(self.ids, skip_special_tokens=True).strip() or None)

    def end(self) -> None:
        pass


def unfinished(assistant: Assistant, codes: DualCodes) -> list[Image.Image]:
    """Codes of the first n positions, [B, n, D] -> pictures in which the places of the others are gray."""
    tokenizer = assistant.model.vision_tokenizer
    done, grid = codes.pixel.shape[1], tokenizer.backbone.grid
    rest = codes.pixel[:, -1:].expand(-1, tokenizer.positions - done, -1)  # any code: its place is covered
    images = assistant.model.decode_image_tokens(DualCodes(torch.cat([codes.pixel, rest], 1), codes.semantic)).cpu()
    drawn = (torch.arange(tokenizer.positions) < done).float().view(1, 1, grid, grid)
    cover = F.interpolate(drawn, size=images.shape[-2:], mode="nearest") < 0.5
    return [to_picture(image) for image in images.masked_fill(cover, EMPTY)]


def answer(assistant: Assistant, chat: Chat, max_new_tokens: int | None = None, stop: Stop = None) -> Iterator[str]:
    """The assistant's next words in a chat."""

    def work(report: Report) -> str:
        return assistant.ask([chat], max_new_tokens=max_new_tokens, streamer=_Words(assistant, report))[0]

    yield from live(work, stop)


def draw(
    assistant: Assistant, prompt: str, number: int, sampling: Sampling, compare: bool = False, stop: Stop = None
) -> Iterator[Shown]:
    """`number` pictures of a prompt row by row, with `compare` also the same seeds without semantic codes.

    Raises UserError for an empty prompt and for too many pictures.
    """
    _check(prompt, number)
    ways = {BOTH: True, PIXEL_ONLY: False} if compare else {BOTH: True}
    yield from _rows(
        assistant,
        {name: sampling.config(assistant, semantic) for name, semantic in ways.items()},
        lambda config, watch: assistant.draw([prompt], number, config, sampling.seed, watch=watch)[0],
        stop,
    )


def edit(
    assistant: Assistant, picture: Any, instruction: str, number: int, sampling: Sampling, stop: Stop = None
) -> Iterator[Shown]:
    """A picture changed as the instruction says, `number` times, row by row.

    Raises UserError for no picture or instruction, and for too many pictures.
    """
    _check(instruction, number)
    if picture is None:
        raise UserError("give a picture to change")
    yield from _rows(
        assistant,
        {"edited": sampling.config(assistant)},
        lambda config, watch: assistant.edit([picture], [instruction], number, config, sampling.seed, watch=watch)[0],
        stop,
    )


def tell(
    assistant: Assistant,
    prompt: str,
    pictures: Sequence[Any],
    max_images: int,
    sampling: Sampling,
    words: int = 64,
    stop: Stop = None,
) -> Iterator[Told]:
    """A story in words and pictures; `words` is the longest stretch of tokens between two pictures.

    Raises UserError for an empty prompt.
    """
    _check(prompt, 1)
    grid, config = assistant.model.vision_tokenizer.backbone.grid, sampling.config(assistant)

    def work(report: Report) -> Told:
        number = 0

        def watch(codes: DualCodes) -> None:
            nonlocal number
            done = codes.pixel.shape[1]
            number += done == 1
            report(Told([], unfinished(assistant, codes)[0], number) if done % grid == 0 else None)

        chat = [user(*pictures, prompt)]
        parts = assistant.tell([chat], max_images, config, sampling.seed, watch=watch, max_new_tokens=words)[0]
        return Told(parts, None, number)

    yield from live(work, stop)


def _rows(assistant: Assistant, ways: dict[str, DrawConfig], make: Any, stop: Stop) -> Iterator[Shown]:
    """Draw once in each way and show the pictures after every row; `make(config, watch)` gives the finished ones."""
    tokenizer = assistant.model.vision_tokenizer
    grid, positions = tokenizer.backbone.grid, tokenizer.positions
    total = len(ways) * positions

    def work(report: Report) -> Shown:
        finished: dict[str, list[Image.Image]] = {}
        for name, config in ways.items():

            def watch(codes: DualCodes, name: str = name, before: dict = finished) -> None:
                done = codes.pixel.shape[1]
                if done % grid or done == positions:
                    return report(None)
                pictures = before | {name: unfinished(assistant, codes)}
                return report(Shown(pictures, len(before) * positions + done, total))

            finished = finished | {name: make(config, watch)}
        return Shown(finished, total, total)

    yield from live(work, stop)


def _check(words: str, number: int) -> None:
    if not words or not words.strip():
        raise UserError("write what you want first")
    if not 1 <= number <= LARGEST:
        raise UserError(f"{number} pictures: ask for 1 to {LARGEST} at once")
