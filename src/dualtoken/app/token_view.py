"""What there is to see of a picture's codes: reconstructions by depth, maps, a position's codes, who shares them.

Shapes: N = grid * grid positions, D depth, K codebook size; a picture is square, S pixels wide.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dualtoken.app.figures import code_colors
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import fit_image, image_bytes, read_image, to_float, to_picture
from dualtoken.data.scene_chat import DETAIL
from dualtoken.data.scenes import Scenes
from dualtoken.mllm.assistant import Assistant

Vocabulary = Literal["pixel", "semantic"]
REFERENCES = 64  # unseen scenes among which patches with the same codes are looked for
FRAME = "#ff2d95"
SWAPS = ("semantic codes", "pixel codes", "first depth of the pixel codes", "lower half of both")


@dataclass(frozen=True)
class Coded:
    """A picture as the tokenizer sees it, and its codes, [1, N, D] of each vocabulary."""

    name: str
    picture: Image.Image
    codes: DualCodes


@dataclass(frozen=True)
class Patch:
    """A place in a picture, cut out with the places around it."""

    name: str
    position: int
    picture: Image.Image


def enlarged(picture: Image.Image, least: int = 288) -> Image.Image:
    """A small picture enlarged by a whole number so that its pixels can be seen."""
    factor = max(1, least // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


class TokenView:
    """The codes of pictures under one model."""

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self.tokenizer = assistant.model.vision_tokenizer
        self.grid, self.size = self.tokenizer.backbone.grid, self.tokenizer.image_size
        self.rows = lru_cache(maxsize=16)(self._rows)

    def depth(self, vocabulary: Vocabulary) -> int:
        """D of a vocabulary."""
        return getattr(self.tokenizer, vocabulary).quantizer.config.depth

    def code(self, picture: Any, name: str = "picture") -> Coded:
        """A file, bytes or picture -> its largest centered square with its codes. Raises UserError."""
        if picture is None:
            raise UserError("give a picture first")
        square = fit_image(read_image(picture), self.size)
        pixels = to_float(image_bytes(square))[None].to(self.assistant.model.device)
        return Coded(name, square, self.assistant.model.look(pixels).to("cpu"))

    def scene(self, index: int) -> Coded:
        """An unseen scene of the bundled world."""
        sample = Scenes(self.size, "test")[index]
        return self.code(to_picture(sample.image), f"scene {index}")

    @cached_property
    def references(self) -> list[Coded]:
        """Pictures among which codes are looked for."""
        return [self.scene(index) for index in range(REFERENCES)]

    def rebuilt(self, codes: DualCodes, depth: int | None = None) -> Image.Image:
        """The picture of codes [1, N, D], from the first `depth` pixel codes of every position."""
        kept = DualCodes(codes.pixel[..., : depth or None], codes.semantic)
        return to_picture(self.assistant.model.decode_image_tokens(kept)[0])

    def code_map(self, coded: Coded, vocabulary: Vocabulary, depth: int = 1, marked: int | None = None) -> Image.Image:
        """Every position in the color of its code at a depth (from 1), near codes in near colors, enlarged.

        Args: marked: the positions that share its code at this depth are framed.
        """
        codes = getattr(coded.codes, vocabulary)[0, :, depth - 1]
        colors = (code_colors(self.rows(vocabulary, depth))[codes] * 255).byte().view(self.grid, self.grid, 3)
        cell = max(1, 288 // self.grid)
        picture = Image.fromarray(colors.numpy()).resize((cell * self.grid,) * 2, Image.Resampling.NEAREST)
        if marked is not None:
            for position in (codes == codes[marked]).nonzero()[:, 0].tolist():
                self._frame(picture, position, 3 if position == marked else 1)
        return picture

    def place(self, x: float, y: float, side: int) -> int:
        """The position under a point of a picture shown `side` pixels wide, counted by rows from 0."""
        column, row = (min(max(int(value * self.grid / side), 0), self.grid - 1) for value in (x, y))
        return row * self.grid + column

    def codes_at(self, coded: Coded, position: int) -> list[tuple[int | None, ...]]:
        """Depth (from 1), pixel code, positions of the picture that have it, semantic code, positions that have it.

        None where a vocabulary is not so deep.
        """
        both = [
            list(zip(codes[position].tolist(), (codes == codes[position]).sum(0).tolist(), strict=True))
            for codes in (coded.codes.pixel[0], coded.codes.semantic[0])
        ]
        listed = enumerate(zip_longest(*both, fillvalue=(None, None)), 1)
        return [(depth, *pixel, *semantic) for depth, (pixel, semantic) in listed]

    def sharing(self, coded: Coded, position: int, vocabulary: Vocabulary, depths: int, most: int = 24) -> list[Patch]:
        """Patches of this picture and of the references whose first `depths` codes are those of a position."""
        wanted = getattr(coded.codes, vocabulary)[0, position, :depths]
        found = []
        for other in [coded, *self.references]:
            same = (getattr(other.codes, vocabulary)[0, :, :depths] == wanted).all(-1)
            places = [p for p in same.nonzero()[:, 0].tolist() if other is not coded or p != position]
            found += [Patch(other.name, place, self.patch(other.picture, place)) for place in places]
            if len(found) >= most:
                break
        return found[:most]

    def patch(self, picture: Image.Image, position: int) -> Image.Image:
        """A position with those around it, framed."""
        left, top, right, bottom = self._box(picture, position)
        width = right - left
        framed = enlarged(picture)
        self._frame(framed, position, 2)
        factor = framed.width / picture.width
        box = (left - width, top - width, right + width, bottom + width)
        return framed.crop(tuple(round(side * factor) for side in box))

    def swapped(self, first: Coded, second: Coded, what: str) -> tuple[DualCodes, DualCodes]:
        """Codes of both after an exchange of `what`, one of SWAPS. Raises UserError for another."""
        if what not in SWAPS:
            raise UserError(f"{what!r} cannot be exchanged: choose one of {', '.join(SWAPS)}")
        mine, other = ([c.codes.pixel.clone(), c.codes.semantic.clone()] for c in (first, second))
        half = self.grid // 2 * self.grid
        parts = {
            "semantic codes": [(1, slice(None), slice(None))],
            "pixel codes": [(0, slice(None), slice(None))],
            "first depth of the pixel codes": [(0, slice(None), slice(1))],
            "lower half of both": [(v, slice(half, None), slice(None)) for v in (0, 1)],
        }
        for vocabulary, positions, depths in parts[what]:
            kept = mine[vocabulary][:, positions, depths].clone()
            mine[vocabulary][:, positions, depths] = other[vocabulary][:, positions, depths]
            other[vocabulary][:, positions, depths] = kept
        return DualCodes(*mine), DualCodes(*other)

    def described(self, codes: DualCodes) -> str:
        """What the model says of the picture that has these codes, [1, N, D]."""
        processor, model = self.assistant.processor, self.assistant.model
        blank = Image.new("RGB", (self.size, self.size))  # holds the place: its codes are given
        inputs = processor.apply_chat_template([self.assistant.about([blank], DETAIL)], add_generation_prompt=True)
        inputs = inputs.to(model.device)
        inputs.pop("pixel_values")
        out = model.generate(**inputs, codes=codes.to(model.device), max_new_tokens=64)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    @torch.no_grad()
    def _rows(self, vocabulary: Vocabulary, depth: int) -> Tensor:
        """What each of the K codes of a depth adds, [K, code_dim], but for a constant; any kind of quantiser."""
        quantizer = getattr(self.tokenizer, vocabulary).quantizer
        codes = torch.arange(quantizer.config.codebook_size, device=self.assistant.model.device)[:, None]
        return quantizer.lookup(torch.cat([torch.zeros_like(codes).expand(-1, depth - 1), codes], 1)).float().cpu()

    def _box(self, picture: Image.Image, position: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a position, in pixels of a picture."""
        row, column = divmod(position, self.grid)
        cell = picture.width / self.grid
        return column * cell, row * cell, (column + 1) * cell, (row + 1) * cell

    def _frame(self, picture: Image.Image, position: int, width: int) -> None:
        left, top, right, bottom = self._box(picture, position)
        ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=FRAME, width=width)
