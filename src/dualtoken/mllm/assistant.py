"""The model at work: pictures and words in, words and pictures out. What commands, the demo and evaluation share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation.interleaved import Reply
from dualtoken.generation.sampling import DrawConfig, DrawEngine
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.presets import open_mllm
from dualtoken.mllm.processor import DualTokenProcessor

Chat = list[dict[str, Any]]
Progress = Callable[[int, int], None]
Watch = Callable[[DualCodes], None]


def user(*parts: Any) -> dict[str, Any]:
    """A turn of the user's: texts as str, anything else is a picture."""
    return {"role": "user", "content": [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]}  # fmt: skip


class Assistant:
    """Answers, draws, edits and tells stories with one model; every method takes a batch of prompts."""

    def __init__(self, model: DualTokenForConditionalGeneration, processor: DualTokenProcessor):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def open(
        cls, model: str, option: str = "--model", device: str | None = None, engine: DrawEngine | None = None
    ) -> "Assistant":
        """The model of a preset or directory, on the GPU where there is one; `engine`: how it draws from now on.

        Raises UserError where there is no such model or device.
        """
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device {device!r}: give cpu, or cuda where there is a GPU ({reason})") from None
        opened, processor = open_mllm(model, option)
        if engine is not None:
            opened.config.draw = opened.config.draw | {"engine": engine}
        return cls(opened.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor)

    def about(self, pictures: Sequence[Any], words: str) -> dict[str, Any]:
        """A turn of the user's about pictures, in the order that the model has learnt."""
        return user(words, *pictures) if self.model.config.words_first else user(*pictures, words)

    def ask(self, chats: Sequence[Chat], **options: Any) -> list[str]:
        """The assistant's next words in each chat; `options` of transformers' generate (max_new_tokens, ...)."""
        inputs = self._inputs(chats)
        out = self.model.generate(**inputs, generation_mode="text", **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def draw(
        self,
        prompts: Sequence[str],
        count: int = 1,
        config: DrawConfig | None = None,
        seed: int | list[int] = 0,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> list[list[Image.Image]]:
        """`count` pictures of each prompt; picture j of a prompt comes from its seed + j.

        progress: told (positions done, N); watch: shown the codes so far, [B, n, D].
        """
        return self._draw([[user(prompt)] for prompt in prompts], count, config, seed, progress, watch)

    def edit(
        self,
        pictures: Sequence[Any],
        instructions: Sequence[str],
        count: int = 1,
        config: DrawConfig | None = None,
        seed: int | list[int] = 0,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> list[list[Image.Image]]:
        """Each picture (file, bytes, array or PIL picture) changed as its instruction says, `count` times."""
        if len(pictures) != len(instructions):
            raise UserError(f"{len(pictures)} pictures and {len(instructions)} instructions: give one for each")
        shown = [Path(picture) if isinstance(picture, str) else picture for picture in pictures]
        chats = [[user(text, picture)] for picture, text in zip(shown, instructions, strict=True)]  # as in training
        return self._draw(chats, count, config, seed, progress, watch)

    def tell(
        self,
        chats: Sequence[Chat],
        max_images: int = 4,
        config: DrawConfig | None = None,
        seed: int | list[int] = 0,
        progress: Progress | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> list[list[str | Image.Image]]:
        """Replies of words and pictures; the model decides when to draw."""
        replies: list[Reply] = self.model.generate(
            **self._inputs(chats), generation_mode="interleaved", draw=config, seed=seed, max_images=max_images,
            callback=progress, watch=watch, **options,
        )  # fmt: skip
        return [self.processor.read(reply, self.model.decode_image_tokens) for reply in replies]

    def _draw(
        self, chats: Sequence[Chat], count: int, config: DrawConfig | None, seed: int | list[int],
        progress: Progress | None, watch: Watch | None,
    ) -> list[list[Image.Image]]:  # fmt: skip
        codes = self.model.generate(
            **self._inputs(chats), generation_mode="image", num_images_per_prompt=count, draw=config, seed=seed,
            callback=progress, watch=watch,
        )  # fmt: skip
        pictures = self.processor.image_processor.postprocess(self.model.decode_image_tokens(codes))
        return [pictures[i : i + count] for i in range(0, len(pictures), count)]

    def _inputs(self, chats: Sequence[Chat]) -> BatchFeature:
        if not chats:
            raise UserError("nothing to do: give at least one prompt")
        return self.processor.apply_chat_template(list(chats), add_generation_prompt=True).to(self.model.device)
