"""The LLM's side of drawing: what it has before it, longer by a few embeds with every pass.

Two kinds: one grows, and works with every causal LLM of transformers; one has its room from the start, at fixed
addresses, so that a pass can be recorded and played again.

Shapes: B rows, T places of the prompt, L places in all, H width of the LLM.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from dualtoken.core.errors import UserError
from dualtoken.generation.context import Model

ROUND = 64  # rooms are multiples of it, so that compiled steps meet few shapes


class GrowingContext:
    """Keys and values grow by joining; transformers makes the masks."""

    def __init__(self, model: Model, mask: Tensor, places: Tensor, new: int):
        """mask int64 [B, T], 0 where a row is padded; places int64 [B, T]; `new` embeds will follow."""
        self.model, self.mask, self.places, self.cache = model, mask, places, DynamicCache()

    def read(self, embeds: Tensor) -> Tensor:
        """Embeds [B, T, H], then [B, 1, H] as often as promised -> the last state, [B, H]."""
        hidden = self._pass(embeds, self.mask)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.places = self.places[:, -1:] + 1
        return hidden

    def _pass(self, embeds: Tensor, mask: Tensor) -> Tensor:
        out = self.model.hidden(
            embeds, attention_mask=mask, position_ids=self.places, past_key_values=self.cache, use_cache=True
        )
        return out.last_hidden_state[:, -1]


def room_for(prompt: int, new: int) -> int:
    """Places L that `FixedContext` makes for a prompt of T and `new` more embeds."""
    return -(-(prompt + new) // ROUND) * ROUND


class FixedContext(GrowingContext):
    """Keys and values have L places from the start; the masks are made here, without a look at what is in them.

    Raises UserError for an LLM whose layers do not all see everything, or whose attention takes no mask.
    """

    def __init__(self, model: Model, mask: Tensor, places: Tensor, new: int):
        super().__init__(model, mask, places, new)
        settings = model.llm.config
        kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or settings._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"draw engine: {type(model.llm).__name__} has layers of {', '.join(sorted(kinds))} and the attention "
                f"{settings._attn_implementation!r}; engines but 'plain' need full attention by 'sdpa' or 'eager'"
            )
        length = room_for(mask.shape[1], new)
        self.cache = StaticCache(config=settings, max_cache_len=length)
        self.real = torch.ones(len(mask), 1, 1, length, dtype=torch.bool, device=mask.device)
        self.numbers = torch.arange(length, device=mask.device)
        self.done = torch.zeros(1, dtype=torch.int64, device=mask.device)  # places that are filled
        self.next_place = torch.zeros_like(places[:, -1:])
        self.restart(mask, places)

    def restart(self, mask: Tensor, places: Tensor) -> None:
        """Forget all, and begin with another prompt that fits into the same room."""
        self.real.copy_(F.pad(mask, (0, len(self.numbers) - mask.shape[1]), value=1)[:, None, None])
        self.next_place.copy_(places[:, -1:])
        self.done.zero_()
        self.cache.reset()
        self.places = places

    def read(self, embeds: Tensor) -> Tensor:
        count = embeds.shape[1]
        rows = self.done + self.numbers[:count]
        seen = self.real & (self.numbers <= rows[:, None])  # [B, 1, T, L]
        # Numbers in place of yes and no, which both kinds of attention add; a row that sees nothing stays finite.
        mask = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)
        hidden = self._pass(embeds, mask)
        self.done.add_(count)
        self.next_place.add_(1)
        self.places = self.next_place
        return hidden
