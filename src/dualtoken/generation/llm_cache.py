"""The LLM's side of drawing: what it has before it, longer by a few embeds with every pass.

Two kinds: one grows, and works with every causal LLM of transformers; one has its room from the start, at fixed
addresses, so that a pass can be recorded and played again.

Shapes: B rows, T places of the prompt, L places in all, H width of the LLM.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, StaticCache

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


def takes_masks(settings: PreTrainedConfig) -> bool:
    """Whether all layers of an LLM see everything, by an attention that takes the masks made here."""
    return _kinds(settings) == {"full_attention"} and settings._attn_implementation in ("sdpa", "eager")


def _kinds(settings: PreTrainedConfig) -> set[str]:
    return set(getattr(settings, "layer_types", None) or ["full_attention"])


class CastCache(StaticCache):
    """Fixed room of one dtype a layer: autocast gives values of another than the keys, and later keys than the first.

    What it casts up or down is cast the same again by the attention, which autocast runs in its own dtype.
    """

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        kind = getattr(self.layers[layer_idx], "dtype", keys.dtype)
        return super().update(keys.to(kind), values.to(kind), layer_idx, *args, **kwargs)


class FixedContext(GrowingContext):
    """Keys and values have L places from the start; the masks are made here, without a look at what is in them.

    Raises UserError for an LLM whose layers do not all see everything, or whose attention takes no mask.
    """

    def __init__(self, model: Model, mask: Tensor, places: Tensor, new: int):
        super().__init__(model, mask, places, new)
        settings = model.llm.config
        if not takes_masks(settings):
            raise UserError(
                f"draw engine: {type(model.llm).__name__} has layers of {', '.join(sorted(_kinds(settings)))} and the "
                f"attention {settings._attn_implementation!r}; engines but 'plain' need full attention by 'sdpa' or "
                "'eager'"
            )
        length = room_for(mask.shape[1], new)
        self.cache = CastCache(config=settings, max_cache_len=length)
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
        # Numbers in place of yes and no, which both kinds of attention add; a row that sees nothing stays finite, so
        # they are of the dtype that attention is computed in.
        at = embeds.device.type
        kind = torch.get_autocast_dtype(at) if torch.is_autocast_enabled(at) else embeds.dtype
        mask = torch.zeros_like(seen, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)
        hidden = self._pass(embeds, mask)
        self.done.add_(count)
        self.next_place.add_(1)
        self.places = self.next_place
        return hidden
