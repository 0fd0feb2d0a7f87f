"""One more place of a Qwen2-type LLM on a GPU for a few rows: five Triton kernels a layer, weights where they are.

transformers' layer is some fifty kernels. Four of the five are linear layers with all that stands around them
(`few_rows.py`), one is the attention.

Shapes: B rows, H width of the LLM, L places of the cache, E width of a head of the attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers import LlamaModel, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dualtoken.generation.context import Model
from dualtoken.generation.few_rows import ROWS, SILU, WIDEST, _after, _before, _wait, holds, launch, linear, three
from dualtoken.generation.llm_cache import FixedContext, takes_masks

BLOCK_L = 128  # places of the cache at once


@triton.jit
def _places(keys, values, real, start, row, at, count, length, HALF: tl.constexpr):
    """Of places `at` [BLOCK_L] of the cache both halves of the keys, the values, and whether they are seen."""
    there, low, whole = at < count, tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    place = start + at[:, None] * 2 * HALF
    near = tl.load(keys + place + low[None, :], mask=there[:, None], other=0.0)
    far = tl.load(keys + place + HALF + low[None, :], mask=there[:, None], other=0.0)
    content = tl.load(values + place + whole[None, :], mask=there[:, None], other=0.0)
    seen = tl.load(real + row * length + at, mask=there, other=0) != 0
    return near, far, content, there & seen


@triton.jit
def _attend(
    projected, cosines, sines, keys, values, real, done, out, scale, length,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_L: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """One head of one row: turn query and key, add key and value to the cache, attend to what is before and itself."""
    _before(NEXT)
    row, head = tl.program_id(0), tl.program_id(1)
    low, whole = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    # What earlier positions left is loaded before the kernel before has ended.
    kv, count = head // GROUP, tl.load(done)
    cosine = tl.load(cosines + row * 2 * HALF + low).to(tl.float32)
    sine = tl.load(sines + row * 2 * HALF + low).to(tl.float32)
    start = (row * (HEADS // GROUP) + kv).to(tl.int64) * length * 2 * HALF
    at = tl.arange(0, BLOCK_L)
    near, far, content, seen = _places(keys, values, real, start, row, at, count, length, HALF)
    _wait(NEXT)
    mine = projected + row * (HEADS + 2 * (HEADS // GROUP)) * 2 * HALF
    q_low = tl.load(mine + head * 2 * HALF + low).to(tl.float32)
    q_high = tl.load(mine + head * 2 * HALF + HALF + low).to(tl.float32)
    k_low = tl.load(mine + (HEADS + kv) * 2 * HALF + low).to(tl.float32)
    k_high = tl.load(mine + (HEADS + kv) * 2 * HALF + HALF + low).to(tl.float32)
    v = tl.load(mine + (HEADS + HEADS // GROUP + kv) * 2 * HALF + whole)
    q_low, q_high = (q_low * cosine - q_high * sine) * scale, (q_high * cosine + q_low * sine) * scale
    k_low, k_high = k_low * cosine - k_high * sine, k_high * cosine + k_low * sine
    if head % GROUP == 0:
        place = start + count * 2 * HALF
        tl.store(keys + place + low, k_low.to(keys.dtype.element_ty))
        tl.store(keys + place + HALF + low, k_high.to(keys.dtype.element_ty))
        tl.store(values + place + whole, v)
    best = tl.sum(q_low * k_low + q_high * k_high, 0)
    weights, total = 1.0, v.to(tl.float32)
    for first in range(0, count, BLOCK_L):
        scores = tl.sum(near.to(tl.float32) * q_low[None, :] + far.to(tl.float32) * q_high[None, :], 1)
        scores, now = tl.where(seen, scores, float("-inf")), content.to(tl.float32)
        near, far, content, seen = _places(
            keys, values, real, start, row, first + BLOCK_L + at, count, length, HALF
        )  # fmt: skip
        higher = tl.maximum(best, tl.max(scores, 0))
        shrink, part = tl.exp(best - higher), tl.exp(scores - higher)
        total = total * shrink + tl.sum(part[:, None] * now, 0)
        weights = weights * shrink + tl.sum(part, 0)
        best = higher
    tl.store(out + (row * HEADS + head) * 2 * HALF + whole, (total / weights).to(out.dtype.element_ty))
    _after(NEXT)


def fits(model: Model, rows: int) -> bool:
    """Whether the LLM's layers are those that the kernels compute, and the rows so few that it pays."""
    return rows <= ROWS and plain_layers(model)


def plain_layers(model: Model) -> bool:
    """Whether the LLM is Qwen2 or Llama on one device with weights as they come: no adapters, no 4-bit numbers.

    Also refused is what the kernels would not see: hooks, dropout, layers that see less than everything, rotary
    positions of a part of the width, or of a period that follows the length of the text.
    """
    base = model.llm.base_model
    if type(base) not in (LlamaModel, Qwen2Model) or base.config.hidden_act != "silu":
        return False
    head = getattr(base.config, "head_dim", None) or base.config.hidden_size // base.config.num_attention_heads
    kind = base.layers[0].self_attn.q_proj.weight.dtype
    turns = getattr(base.config, "rope_parameters", None) or {}
    return (
        head == triton.next_power_of_2(head)
        and {p.device for p in base.parameters()} == {model.device}
        and takes_masks(model.llm.config)
        and turns.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and turns.get("partial_rotary_factor", 1.0) == 1.0
        and not (base.training and base.config.attention_dropout)
        and not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in base.modules())
        and all(_plain(layer, kind) for layer in base.layers)
    )


def _plain(layer: nn.Module, kind: torch.dtype) -> bool:
    """A layer of such weights, with biases at most behind queries, keys, values."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    inputs = attention.q_proj, attention.k_proj, attention.v_proj
    bare = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return (
        all(type(m) in (LlamaRMSNorm, Qwen2RMSNorm) for m in norms)
        and all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in (*inputs, *bare))
        and all(m.weight.dtype is kind and m.weight.is_contiguous() for m in (*inputs, *bare))
        and len({m.bias is None for m in inputs}) == 1
        and all(m.bias is None for m in bare)
        and holds(inputs[0].in_features, kind)
    )


class FusedContext(FixedContext):
    """The prompt through transformers, all that follows through the kernels; for models that `fits`."""

    def read(self, embeds: Tensor) -> Tensor:
        """As `GrowingContext.read`."""
        if self.places is not self.next_place:  # the prompt
            return super().read(embeds)
        base, x = self.model.llm.base_model, embeds[:, 0].contiguous()
        turns = [t.contiguous() for t in base.rotary_emb(x, self.next_place)]
        for layer, cache in zip(base.layers, self.cache.layers, strict=True):
            x = self._layer(layer, cache, x, *turns)
        self.done.add_(1)
        self.next_place.add_(1)
        return base.norm(x)

    def _layer(self, layer: nn.Module, cache, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """x [B, H] -> [B, H]; the cache has one more place filled."""
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        projected, seen = three(x, (q, k, v), layer.input_layernorm), x.new_empty(len(x), q.out_features)
        heads = q.out_features // attention.head_dim
        launch(
            _attend, (len(x), heads),
            projected, cosines, sines, cache.keys, cache.values, self.real, self.done, seen, attention.scaling,
            cache.keys.shape[2], HEADS=heads, GROUP=q.out_features // k.out_features, HALF=attention.head_dim // 2,
            BLOCK_L=BLOCK_L, num_warps=8, device=x.device,
        )  # fmt: skip
        x = linear(seen, attention.o_proj, residual=x)
        wide = mlp.down_proj.in_features > WIDEST
        inner = linear(x, mlp.up_proj, layer.post_attention_layernorm, SILU, mlp.gate_proj, small_next=wide)
        return linear(inner, mlp.down_proj, residual=x)
