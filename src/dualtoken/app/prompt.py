"""The model at Python's prompt and in notebooks: `dualtoken.load()`."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError, whole_number
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant, user
from dualtoken.tokenizer.image_processor import Picture

KINDS = (Image.Image, str, Path, bytes, np.ndarray, torch.Tensor)
GAP = 4  # px between pictures side by side


class Pictures(list[Image.Image]):
    """Pictures that a notebook shows side by side."""

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        width = sum(p.width for p in self) + GAP * (len(self) - 1)
        sheet, left = Image.new("RGB", (width, max(p.height for p in self)), "white"), 0
        for picture in self:
            sheet.paste(picture, (left, 0))
            left += picture.width + GAP
        return _png(sheet)


class Story(list[str | Image.Image]):
    """Words and pictures in turn, which a notebook shows as they follow each other."""

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(part)}</p>"
            if isinstance(part, str)
            else f'<p><img alt="picture" src="data:image/png;base64,{base64.b64encode(_png(part)).decode()}"></p>'
            for part in self
        )


class Model:
    """A multimodal model. Pictures may be PIL pictures, paths, bytes or uint8 arrays [H, W, 3]; errors are UserError.

    Where a method takes `number`, it gives one picture without it, and `Pictures` with it; picture j is made from
    seed + j. `draw` options: guidance, pixel and semantic (dicts of temperature, top_k, top_p), semantic_codes.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant

    @classmethod
    def load(cls, model: str, device: str | None = None) -> "Model":
        """See `dualtoken.load`."""
        return cls(Assistant.open(model, "model", device))

    def ask(self, picture: Picture | Sequence[Picture] | None, question: str, max_new_tokens: int | None = None) -> str:
        """The answer to a question about a picture, several, or (None) nothing shown."""
        chat = [self.assistant.about(self._open(picture), _words(question, "question"))]
        return self.assistant.ask([chat], max_new_tokens=max_new_tokens)[0]

    def draw(self, prompt: str, number: int | None = None, seed: int = 0, **draw: Any) -> Image.Image | Pictures:
        """Pictures of a prompt."""
        count = _count(number)
        made = self.assistant.draw([_words(prompt, "prompt")], count, self._drawing(draw), seed)[0]
        return made[0] if number is None else Pictures(made)

    def edit(
        self, picture: Picture, instruction: str, number: int | None = None, seed: int = 0, **draw: Any
    ) -> Image.Image | Pictures:
        """A picture changed as an instruction says."""
        shown, count = self._open(picture), _count(number)
        if len(shown) != 1:
            raise UserError(f"picture: {len(shown)} given; give exactly one to edit")
        made = self.assistant.edit(shown, [_words(instruction, "instruction")], count, self._drawing(draw), seed)[0]
        return made[0] if number is None else Pictures(made)

    def tell(
        self, prompt: str, picture: Picture | Sequence[Picture] | None = None, max_images: int = 4, seed: int = 0,
        **draw: Any,
    ) -> Story:  # fmt: skip
        """Words and pictures; the model decides when to draw."""
        chat = [user(*self._open(picture), _words(prompt, "prompt"))]
        return Story(self.assistant.tell([chat], max_images, self._drawing(draw), seed)[0])

    @torch.no_grad()
    def encode(self, picture: Picture | Sequence[Picture]) -> DualCodes:
        """Codes of one picture or several, [B, N, D] in both vocabularies."""
        shown = self._open(picture)
        if not shown:
            raise UserError("picture: give at least one")
        tokenizer = self.assistant.model.vision_tokenizer
        pixels = self.assistant.processor.image_processor(shown)["pixel_values"]
        return tokenizer.encode(pixels.to(tokenizer.device, tokenizer.dtype)).to("cpu")

    def decode(self, codes: DualCodes) -> Pictures:
        """Pictures of codes."""
        if not isinstance(codes, DualCodes):
            raise UserError(f"codes of type {type(codes).__name__}: give DualCodes, as encode makes them")
        images = self.assistant.model.decode_image_tokens(codes)
        return Pictures(self.assistant.processor.image_processor.postprocess(images))

    def reconstruct(self, picture: Picture | Sequence[Picture]) -> Image.Image | Pictures:
        """A picture, or several, through codes and back."""
        made = self.decode(self.encode(picture))
        return made if isinstance(picture, (list, tuple)) else made[0]

    def _open(self, picture: Any) -> list[Picture]:
        given = [] if picture is None else picture if isinstance(picture, (list, tuple)) else [picture]
        for one in given:
            if not isinstance(one, KINDS):
                raise UserError(f"picture of type {type(one).__name__}: give a PIL picture, path, bytes or array")
        # a path given as text would be taken for words: user() tells pictures by not being text
        return [Path(one) if isinstance(one, str) else one for one in given]

    def _drawing(self, options: dict[str, Any]) -> DrawConfig:
        known = ("guidance", "pixel", "semantic", "semantic_codes")
        if unknown := set(options) - set(known):
            raise UserError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return self.assistant.model.draw_config.changed(**options)


def _words(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name} {text!r}: give words")
    return text


def _count(number: int | None) -> int:
    return 1 if number is None else whole_number("number", number, 1)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
