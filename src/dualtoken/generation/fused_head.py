"""The depth steps of a visual head on a GPU for a few rows, as Triton kernels: `few_rows.py`, one for the attention.

Shapes: B rows, H width of the LLM, W width of the head, D depth, K codebook size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dualtoken.generation.few_rows import GELU, GELU_TANH, ROWS, _after, _before, _wait, holds, launch, linear
from dualtoken.tokenizer.branch import AttentionCache, GatedMLP


@triton.jit
def _attend(
    qkv, keys, values, out, depth, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTHS: tl.constexpr, ROOM: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """One head of one row at a depth counted from 0: adds key and value to the cache, attends to all up to itself."""
    _before(NEXT)
    row, head, at, d = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, ROOM)
    mine = qkv + (row * 3 * HEADS + head) * WIDTH + at
    place = (row * HEADS + head) * DEPTHS * WIDTH
    before, inside = (d < depth)[:, None], d[:, None] * WIDTH + at[None, :]
    _wait(NEXT)
    q, k, v = tl.load(mine), tl.load(mine + HEADS * WIDTH), tl.load(mine + 2 * HEADS * WIDTH)
    tl.store(keys + place + depth * WIDTH + at, k)
    tl.store(values + place + depth * WIDTH + at, v)
    own = (d == depth)[:, None]
    all_keys = tl.where(own, k[None, :], tl.load(keys + place + inside, mask=before, other=0.0)).to(tl.float32)
    all_values = tl.where(own, v[None, :], tl.load(values + place + inside, mask=before, other=0.0)).to(tl.float32)
    scores = tl.sum(all_keys * q.to(tl.float32)[None, :], 1) * scale
    scores = tl.where(d <= depth, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    result = tl.sum(all_values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (row * HEADS + head) * WIDTH + at, result.to(out.dtype.element_ty))
    _after(NEXT)


def fits(head: nn.Module, rows: int) -> bool:
    """Whether the kernels compute this head, and the rows are so few that it pays."""
    width, layers = head.config.width // head.config.heads, [m for m in head.modules() if isinstance(m, nn.Linear)]
    return (
        rows <= ROWS
        and width == triton.next_power_of_2(width)
        and holds(head.config.width, head.positions.dtype)
        and len({p.dtype for p in head.parameters()}) == 1
        and all(type(m) is nn.Linear and m.weight.is_contiguous() for m in layers)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
    )


def _projector(head: nn.Module) -> list[nn.Linear]:
    """The layers of the generation projector, a GELU between them."""
    return [m for m in head.projector.modules() if isinstance(m, nn.Linear)]


class FusedHead:
    """Of a `VisualHead` what drawing needs, where it `fits`: `start`, and `step` with the same numbers."""

    def __init__(self, head: nn.Module):
        self.head, self.config, self.start = head, head.config, head.start

    def step(self, state, given: Tensor) -> Tensor:
        """As `VisualHead.step`; the caches of the state get their room at depth 1."""
        head, depth = self.head, state.depth
        if depth == 0:
            layers = (
                [head.projector] if isinstance(head.projector, nn.Linear) else [head.projector[0], head.projector[2]]
            )
            x = given.contiguous() if len(layers) == 1 else linear(given.contiguous(), layers[0], act=GELU)
        else:
            chosen = head.embed(given, depth - 1)
            x = state.embeds = chosen if state.embeds is None else state.embeds + chosen
            layers = [head.embed_in]
        x = linear(x, layers[-1], residual=head.positions[depth])
        for block, cache in zip(head.blocks, state.caches, strict=True):
            x = self._block(block, cache, x, depth)
        state.depth += 1
        return linear(x, head.classifiers[0 if head.config.shared_classifier else depth], head.norm)

    def _block(self, block: nn.Module, cache: AttentionCache, x: Tensor, depth: int) -> Tensor:
        """x [B, W] -> [B, W]."""
        config, rows = self.config, len(x)
        if depth == 0:
            cache.keys = x.new_empty(rows, config.heads, config.depth, config.width // config.heads)
            cache.values = torch.empty_like(cache.keys)
        seen, width = torch.empty_like(x), config.width // config.heads
        launch(
            _attend, (rows, config.heads),
            linear(x, block.qkv, block.norm, small_next=True), cache.keys, cache.values, seen, depth, width**-0.5,
            HEADS=config.heads, WIDTH=width, DEPTHS=config.depth, ROOM=triton.next_power_of_2(config.depth),
            device=x.device, num_warps=1,
        )  # fmt: skip
        x, mlp = linear(seen, block.out, residual=x), block.mlp
        if isinstance(mlp, GatedMLP):
            inner, last = linear(x, mlp.up, mlp.norm, GELU_TANH, mlp.gate), mlp.down
        else:
            inner, last = linear(x, mlp[1], mlp[0], GELU), mlp[3]
        return linear(inner, last, residual=x)
