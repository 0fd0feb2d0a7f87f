"""Guidance and sampling on a GPU in one Triton kernel, without a sort: cuts are found bit by bit.

The k-th largest number, the one at which the probability of all above it crosses p, and the one at which it crosses the
random number are each the largest number whose sum with all above is enough; 32 sums over registers find its bits. topk
and its sort took 100 us for one row of 16384 (LOG.md).

Shapes: B images, K codebook size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualtoken.generation.sampling import HeadSampling

WIDEST = 2**15  # logits of a row that fit into registers
WARPS = 16


@triton.jit
def _ordered(x):
    """Whole numbers that stand in the order of the float32 numbers x."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ tl.full((), 0x80000000, tl.uint32)


@triton.jit
def _crossing(order, weights, target, STRICT: tl.constexpr):
    """The largest number whose own weight and that of all above it reach the target (STRICT: pass it); 0 if none."""
    found, bit = tl.zeros((), tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        tried = found | bit
        reached = tl.sum(tl.where(order >= tried, weights, 0.0), 0)
        enough = (reached > target) if STRICT else (reached >= target)
        found = tl.where(enough, tried, found)
        bit = bit >> 1
    return found


@triton.jit
def _sample(
    logits, uniform, out, guidance, temperature, top_k, top_p, size, images, stride,
    BLOCK: tl.constexpr, GUIDED: tl.constexpr, LIKELIEST: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    image, at = tl.program_id(0), tl.arange(0, BLOCK)
    there = at < size
    x = tl.load(logits + image * size + at, mask=there, other=float("-inf")).to(tl.float32)
    if GUIDED:
        without = tl.load(logits + (images + image) * size + at, mask=there, other=0.0).to(tl.float32)
        x = tl.where(there, without + guidance * (x - without), float("-inf"))
    order = tl.where(there, _ordered(x), 0)
    highest = tl.max(order, 0)
    if LIKELIEST:
        code = tl.min(tl.where(order == highest, at, size), 0)
    else:
        weights = tl.where(there, tl.exp((x - tl.max(x, 0)) / temperature), 0.0)
        ones = tl.where(there, 1.0, 0.0)
        if TOP_K:
            last = _crossing(order, ones, top_k, False)
            above, alike = tl.sum(tl.where(order > last, ones, 0.0), 0), order == last
            rank = tl.cumsum(tl.where(alike, 1.0, 0.0), 0)  # of equal logits the first are kept
            weights = tl.where((order > last) | (alike & (above + rank <= top_k)), weights, 0.0)
        total, last = tl.sum(weights, 0), tl.zeros((), tl.uint32)
        if TOP_P:
            target = top_p * total
            last = _crossing(order, weights, target, False)
            before = tl.sum(tl.where(order > last, weights, 0.0), 0)
            alike = (order == last) & (weights > 0)
            rank = tl.cumsum(tl.where(alike, 1.0, 0.0), 0)
            kept = alike & (before + (rank - 1) * weights < target)
            weights = tl.where((order > last) | kept, weights, 0.0)
            total = tl.sum(weights, 0)
        target = tl.load(uniform + image * stride) * total
        chosen = tl.maximum(_crossing(order, weights, target, True), last)
        before = tl.sum(tl.where(order > chosen, weights, 0.0), 0)
        alike = (order == chosen) & (weights > 0)
        rank = tl.cumsum(tl.where(alike, 1.0, 0.0), 0)
        passed = alike & (before + rank * weights > target)
        code = tl.min(tl.where(passed, at, size), 0)
        code = tl.where(code == size, tl.max(tl.where(alike, at, 0), 0), code)  # sums by rounding just below
    tl.store(out + image, code.to(tl.int64))


def sample_gpu(logits: Tensor, sampling: HeadSampling, guidance: float, uniform: Tensor) -> Tensor:
    """`sample` of guided logits [B or 2B, K] with uniform numbers [B] -> int64 [B]; of equal logits the first wins."""
    images, size = len(uniform), logits.shape[1]
    out = torch.empty(images, dtype=torch.int64, device=logits.device)
    _sample[(images,)](
        logits.contiguous(), uniform, out, float(guidance), max(sampling.temperature, 1e-6), float(sampling.top_k),
        float(sampling.top_p), size, images, uniform.stride(0), triton.next_power_of_2(size),
        GUIDED=len(logits) > images, LIKELIEST=sampling.temperature == 0, TOP_K=0 < sampling.top_k < size,
        TOP_P=sampling.top_p < 1, num_warps=WARPS,
    )  # fmt: skip
    return out
