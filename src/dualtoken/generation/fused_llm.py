"""One more place of a Qwen2-type LLM on a GPU for a few rows: five Triton kernels a layer.

With one or two pictures a pass reads weights and does little else, so launches count: transformers' layer is some fifty
kernels. Here the norms are part of the products that follow them, as are bias, activation and residual; weights stay
where they are. Figures, and what was tried beside: docs/benchmarks.md, LOG.md.

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
from dualtoken.generation.llm_cache import FixedContext, takes_masks

ROWS = 4  # beyond, libraries' products are faster
BLOCK_N, BLOCK_K, BLOCK_L = 4, 512, 64  # outputs and inputs of a product, places of the cache


@triton.jit
def _products(
    x, gain, eps, weight, n, there, rows, width,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rows n [BLOCK_N] of weight [N, width] times x [B, width] -> [ROWS, BLOCK_N].

    With NORM times the RMS norm of x: its gain on the way, its scale at the end.
    """
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(weight + n[:, None] * width + k[None, :], mask=there[:, None] & (k < width)[None, :], other=0.0)
        inside = (row < rows)[:, None] & (k < width)[None, :]
        given = tl.load(x + row[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += given * given
            given *= tl.load(gain + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        total += given[:, None, :] * w.to(tl.float32)[None, :, :]
    result = tl.sum(total, 2)
    if NORM:
        result *= tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
    return result


@triton.jit
def _queries_keys_values(
    x, gain, eps, w_q, b_q, n_q, w_k, b_k, w_v, b_v, n_k, out, rows, width,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """norm(x) through three layers, side by side in out [B, n_q + 2 n_k]; sizes are multiples of BLOCK_N."""
    first = tl.program_id(0) * BLOCK_N
    weight, bias, before = w_q, b_q, 0
    if first >= n_q:
        weight, bias, before = w_k, b_k, n_q
    if first >= n_q + n_k:
        weight, bias, before = w_v, b_v, n_q + n_k
    n = first - before + tl.arange(0, BLOCK_N)
    there = n >= 0
    made = _products(x, gain, eps, weight, n, there, rows, width, ROWS, BLOCK_N, BLOCK_K, True)
    if BIAS:
        made += tl.load(bias + n).to(tl.float32)[None, :]
    row = tl.arange(0, ROWS)
    place = out + row[:, None] * (n_q + 2 * n_k) + (before + n)[None, :]
    tl.store(place, made.to(out.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])


@triton.jit
def _gate_and_up(
    x, gain, eps, w_gate, w_up, out, rows, width, hidden,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(gate(norm(x))) * up(norm(x)) -> out [B, hidden]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < hidden
    gate = _products(x, gain, eps, w_gate, n, there, rows, width, ROWS, BLOCK_N, BLOCK_K, True)
    up = _products(x, gain, eps, w_up, n, there, rows, width, ROWS, BLOCK_N, BLOCK_K, True)
    row = tl.arange(0, ROWS)
    made = gate * tl.sigmoid(gate) * up
    place = out + row[:, None] * hidden + n[None, :]
    tl.store(place, made.to(out.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])


@triton.jit
def _add_product(
    x, weight, residual, out, rows, width, size,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """residual + a layer without bias of x -> out [B, size]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < size
    made = _products(x, x, 0.0, weight, n, there, rows, width, ROWS, BLOCK_N, BLOCK_K, False)
    row = tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & there[None, :]
    place = row[:, None] * size + n[None, :]
    made += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, made.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    projected, cosines, sines, keys, values, real, done, out, scale, length,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One head of one row: turn query and key, add key and value to the cache, attend to what is before and itself."""
    row, head = tl.program_id(0), tl.program_id(1)
    low, whole = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    kv, count = head // GROUP, tl.load(done)
    cosine = tl.load(cosines + row * 2 * HALF + low).to(tl.float32)
    sine = tl.load(sines + row * 2 * HALF + low).to(tl.float32)
    mine = projected + row * (HEADS + 2 * (HEADS // GROUP)) * 2 * HALF
    q_low = tl.load(mine + head * 2 * HALF + low).to(tl.float32)
    q_high = tl.load(mine + head * 2 * HALF + HALF + low).to(tl.float32)
    k_low = tl.load(mine + (HEADS + kv) * 2 * HALF + low).to(tl.float32)
    k_high = tl.load(mine + (HEADS + kv) * 2 * HALF + HALF + low).to(tl.float32)
    v = tl.load(mine + (HEADS + HEADS // GROUP + kv) * 2 * HALF + whole)
    q_low, q_high = (q_low * cosine - q_high * sine) * scale, (q_high * cosine + q_low * sine) * scale
    k_low, k_high = k_low * cosine - k_high * sine, k_high * cosine + k_low * sine
    start = (row * (HEADS // GROUP) + kv).to(tl.int64) * length * 2 * HALF
    if head % GROUP == 0:
        place = start + count * 2 * HALF
        tl.store(keys + place + low, k_low.to(keys.dtype.element_ty))
        tl.store(keys + place + HALF + low, k_high.to(keys.dtype.element_ty))
        tl.store(values + place + whole, v)
    best = tl.sum(q_low * k_low + q_high * k_high, 0)
    weights, total = 1.0, v.to(tl.float32)
    for first in range(0, count, BLOCK_L):
        at = first + tl.arange(0, BLOCK_L)
        there = at < count
        place = keys + start + at[:, None] * 2 * HALF + low[None, :]
        near = tl.load(place, mask=there[:, None], other=0.0).to(tl.float32) * q_low[None, :]
        far = tl.load(place + HALF, mask=there[:, None], other=0.0).to(tl.float32) * q_high[None, :]
        seen = there & (tl.load(real + row * length + at, mask=there, other=0) != 0)
        scores = tl.where(seen, tl.sum(near + far, 1), float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        shrink, part = tl.exp(best - higher), tl.exp(scores - higher)
        place = values + start + at[:, None] * 2 * HALF + whole[None, :]
        content = tl.load(place, mask=there[:, None], other=0.0).to(tl.float32)
        total = total * shrink + tl.sum(part[:, None] * content, 0)
        weights = weights * shrink + tl.sum(part, 0)
        best = higher
    tl.store(out + (row * HEADS + head) * 2 * HALF + whole, (total / weights).to(out.dtype.element_ty))


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
    three = attention.q_proj, attention.k_proj, attention.v_proj
    bare = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return (
        all(type(m) in (LlamaRMSNorm, Qwen2RMSNorm) for m in norms)
        and all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in (*three, *bare))
        and all(m.weight.dtype is kind and m.weight.is_contiguous() for m in (*three, *bare))
        and len({m.bias is None for m in three}) == 1
        and all(m.bias is None for m in bare)
        and all(m.out_features % BLOCK_N == 0 for m in three)
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
        rows, width = x.shape
        heads, half = q.out_features // attention.head_dim, attention.head_dim // 2
        norm, projected = layer.input_layernorm, x.new_empty(rows, q.out_features + 2 * k.out_features)
        tile = {"ROWS": triton.next_power_of_2(rows), "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        biases = [x if m.bias is None else m.bias for m in (q, k, v)]
        _queries_keys_values[(projected.shape[1] // BLOCK_N,)](
            x, norm.weight, norm.variance_epsilon, q.weight, biases[0], q.out_features, k.weight, biases[1],
            v.weight, biases[2], k.out_features, projected, rows, width, BIAS=q.bias is not None, **tile,
        )  # fmt: skip
        seen = x.new_empty(rows, q.out_features)
        _attend[(rows, heads)](
            projected, cosines, sines, cache.keys, cache.values, self.real, self.done, seen, attention.scaling,
            cache.keys.shape[2], HEADS=heads, GROUP=q.out_features // k.out_features, HALF=half, BLOCK_L=BLOCK_L,
        )  # fmt: skip
        x = _add(seen, attention.o_proj, x, tile)
        norm, inner = layer.post_attention_layernorm, x.new_empty(rows, mlp.gate_proj.out_features)
        _gate_and_up[(triton.cdiv(inner.shape[1], BLOCK_N),)](
            x, norm.weight, norm.variance_epsilon, mlp.gate_proj.weight, mlp.up_proj.weight, inner, rows, width,
            inner.shape[1], **tile,
        )  # fmt: skip
        return _add(inner, mlp.down_proj, x, tile)


def _add(x: Tensor, layer: nn.Linear, residual: Tensor, tile: dict[str, int]) -> Tensor:
    """A layer of x on top of the residual."""
    out = torch.empty_like(residual)
    _add_product[(triton.cdiv(out.shape[1], BLOCK_N),)](
        x, layer.weight, residual, out, len(x), x.shape[1], out.shape[1], **tile
    )
    return out
