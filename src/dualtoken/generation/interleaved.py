"""Replies of words and pictures: the model decides when to draw, and what it drew is context for what follows.

Writing and drawing alternate: all rows write until each ends or asks for a picture, the pictures asked for are drawn
as one batch, and so on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.generation.context import Context, Model
from dualtoken.generation.image import draw
from dualtoken.generation.sampling import DrawConfig
from dualtoken.generation.text import stop_ids, write


@dataclass
class Reply:
    """What the model said and drew, in order: ids [T] of text, or codes of one image."""

    parts: list[Tensor | DualCodes] = field(default_factory=list)
    ended: bool = False  # False where a limit cut it off

    @property
    def images(self) -> list[DualCodes]:
        """The drawn images."""
        return [part for part in self.parts if isinstance(part, DualCodes)]


@torch.no_grad()
def interleave(
    model: Model,
    contexts: list[Context],
    unconditional: list[Context] | None,
    config: DrawConfig,
    seeds: list[int],
    max_images: int = 4,
    callback: Callable[[int, int], None] | None = None,
    watch: Callable[[DualCodes], None] | None = None,
    **options,
) -> list[Reply]:
    """Go on with each context until it ends, has drawn `max_images`, or the LLM takes no more.

    Raises UserError where the LLM has room for nothing: neither for the first words nor for a picture in their place.

    Args: seeds: a number for each row; its k-th image uses seed + k. `options` as in `text.write`, for each stretch
        of words.
    """
    replies = [Reply() for _ in contexts]
    contexts = list(contexts)
    plain = None if unconditional is None else list(unconditional)
    ends, options = set(stop_ids(model)), options | {"may_draw": True, "draw_semantic": config.semantic_codes}
    active = list(range(len(contexts)))
    begun = False
    while active:
        wanting, written = [], write(model, [contexts[i] for i in active], shorten=begun, **options)
        begun = True
        for row, ids in zip(active, written, strict=True):
            reply, last = replies[row], int(ids[-1])
            wants, ended = last == model.config.draw_start_id, last in ends
            spoken = ids[:-1] if wants or ended else ids
            if len(spoken):
                reply.parts.append(spoken)
            contexts[row] = contexts[row].extend(spoken)
            fits = len(contexts[row].ids) + 1 + model.config.positions <= model.context
            if wants and len(reply.images) < max_images and (fits or not reply.parts):
                wanting.append(row)
            else:
                reply.ended = ended
        if wanting:
            chosen = [contexts[i] for i in wanting], None if plain is None else [plain[i] for i in wanting]
            numbers = [seeds[i] + len(replies[i].images) for i in wanting]
            codes = draw(model, *chosen, config, numbers, callback, watch)
            for place, row in enumerate(wanting):
                replies[row].parts.append(codes[place])
                contexts[row] = contexts[row].draw(model.config, codes[place])
                if plain is not None:
                    plain[row] = plain[row].draw(model.config, codes[place])
        active = [row for row in wanting if len(contexts[row].ids) < model.context]
    return replies
