"""What a model has before it when it goes on: one row of ids with the codes of its pictures, and rows as a batch.

Generation knows the model by what it can do (`Model`), so that the model may offer `generate`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError


class Model(Protocol):
    """What generation needs of `mllm.model.DualTokenForConditionalGeneration`."""

    config: Any
    llm: Any
    projector: nn.Module
    pixel_head: Any
    semantic_head: Any
    vision_tokenizer: Any
    context: int
    device: torch.device

    def embed(self, input_ids: Tensor, codes: DualCodes | None, draw_semantic: Tensor | None = None) -> Tensor: ...
    def hidden(self, embeds: Tensor, **kwargs) -> Any: ...


@dataclass(frozen=True)
class Context:
    """One row: ids [T] without padding, and the codes of its pictures in order."""

    ids: Tensor
    codes: DualCodes | None = None

    def extend(self, ids: Tensor | list[int], codes: DualCodes | None = None) -> "Context":
        """The row with more ids, and more pictures."""
        more = torch.as_tensor(ids, dtype=self.ids.dtype, device=self.ids.device)
        known = [c for c in (self.codes, codes) if c is not None and len(c)]
        return Context(torch.cat([self.ids, more]), DualCodes.cat(known) if known else None)

    def draw(self, config: Any, codes: DualCodes) -> "Context":
        """The row with one drawn picture, closed."""
        ids = [config.draw_start_id, *[config.image_id] * config.positions, config.draw_end_id]
        return self.extend(ids, codes)


@dataclass
class Rows:
    """Contexts as a batch, padded on the left."""

    embeds: Tensor  # [B, T, H]
    mask: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T]


def check_placeholders(counts: list[int], images: int, positions: int) -> None:
    """Raise UserError unless the placeholders in each row are those of whole pictures, and of all of them."""
    found, needed = sum(counts), images * positions
    if found != needed:
        raise UserError(
            f"the text has {found} image placeholders, {images} images of {positions} positions need {needed}; give "
            "one picture for every picture in the prompt"
        )
    if any(count % positions for count in counts):
        raise UserError(f"rows of {counts} image placeholders: each needs a multiple of {positions}")


def split(config: Any, ids: Tensor, mask: Tensor | None, codes: DualCodes | None) -> list[Context]:
    """A batch of ids [B, T] with padding -> its rows. Raises UserError where placeholders do not fit the pictures."""
    mask = torch.ones_like(ids) if mask is None else mask
    counts = ((ids == config.image_id) & (mask > 0)).sum(1).tolist()
    check_placeholders(counts, 0 if codes is None else len(codes), config.positions)
    if codes is not None:  # a class token's code is not for the LLM
        codes = DualCodes(codes.pixel, codes.semantic[:, -config.positions :])
    rows, at = [], 0
    for row, keep, count in zip(ids, mask > 0, counts, strict=True):
        n = count // config.positions
        rows.append(Context(row[keep], None if codes is None or n == 0 else codes[at : at + n]))
        at += n
    return rows


def join(model: Model, contexts: list[Context], new: int, draw_semantic: bool = True) -> Rows:
    """Rows as one batch with room for `new` more tokens.

    Raises UserError where the context of the LLM is too short for that.
    """
    longest = max(len(c.ids) for c in contexts)
    if longest + new > model.context:
        raise UserError(
            f"the prompt has {longest} tokens and the reply needs up to {new}: more than the {model.context} that the "
            "LLM takes; shorten the prompt, or give fewer pictures, a lower --max_images or --max_new_tokens"
        )
    ids = torch.full((len(contexts), longest), model.config.vision_end_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        start = longest - len(context.ids)
        ids[row, start:] = context.ids.to(model.device)
        mask[row, start:] = 1
    parts = [c.codes for c in contexts if c.codes is not None]
    codes = DualCodes.cat(parts).to(model.device) if parts else None
    known = None if codes is None or draw_semantic else torch.zeros(len(codes), dtype=torch.bool, device=model.device)
    return Rows(model.embed(ids, codes, known), mask, (mask.cumsum(1) - 1).clamp(min=0))
