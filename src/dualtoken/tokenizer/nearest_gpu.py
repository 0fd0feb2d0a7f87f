"""Residual codes on a GPU, as one Triton kernel: distances stay in registers, as do the best so far and what is left.

Each program takes BLOCK_M rows of x through all depths, and runs over the codebook BLOCK_K rows at a time; neither
M x K distances nor a block of them is ever written to memory. Products are of float32 exactness: each factor, scaled by
a power of two, is the sum of two float16 numbers, and of their four products the three that count are made by the
tensor cores, at twice the rate of TF32. With one product other codes would win (LOG.md).
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 2**13  # fewer rows of x than that in smaller blocks, so that all of the GPU has some
SMALL, LARGE = (16, 128, 2), (64, 32, 4)  # rows of x at once, rows of the codebook, warps
TOP = 14  # scaled numbers lie below 2**TOP: far from float16's end, and what is 2**-16 of the largest is still exact


@triton.jit
def _nearest(
    x, table, high, low, half_norms, unit, out, rows, codes, width, depth,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, slot = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    left = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    step = tl.load(unit)
    for d in range(depth):
        # 2**(TOP - 1) over the power of two below the largest number of the row, by its bits
        power = tl.max(tl.abs(left), 1).to(tl.int32, bitcast=True) >> 23
        scale = ((TOP - 1 + 2 * 127 - tl.maximum(power, 27)) << 23).to(tl.float32, bitcast=True)
        scaled = left * scale[:, None]
        left_high = scaled.to(tl.float16)
        left_low = (scaled - left_high.to(tl.float32)).to(tl.float16)
        back = step / scale
        best = tl.full((BLOCK_M, BLOCK_K), float("inf"), tl.float32)  # of each place of a block over all blocks
        chosen = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for first in range(0, codes, BLOCK_K):
            place = (first + slot)[None, :] * BLOCK_C + column[:, None]
            their_high, their_low = tl.load(high + place), tl.load(low + place)
            product = tl.dot(left_low, their_high)
            product = tl.dot(left_high, their_low, product)
            product = tl.dot(left_high, their_high, product)
            distances = tl.load(half_norms + first + slot)[None, :] - product * back[:, None]
            closer = distances < best  # on a tie the earlier block stays
            chosen = tl.where(closer, first, chosen)
            best = tl.where(closer, distances, best)
        least = tl.min(best, 1)
        code = tl.min(tl.where(best == least[:, None], chosen + slot[None, :], codes), 1)
        code = tl.minimum(code, codes - 1)  # a row that is not a number has no nearest
        tl.store(out + row * depth + d, code.to(tl.int64), mask=row < rows)
        left -= tl.load(table + code[:, None] * width + column[None, :], mask=inside, other=0.0)


def residual_codes_gpu(x: Tensor, weight: Tensor, depth: int) -> Tensor:
    """Codes int64 [M, D] of rows x [M, C] over one codebook [K, C], both float32: at each depth the nearest row.

    What is left for the next depth is the rest in float32; of rows as near the lowest wins.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(len(x), depth, dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return out
    rows, codes, warps = SMALL if len(x) < FEW else LARGE
    width, size = max(16, triton.next_power_of_2(x.shape[1])), triton.cdiv(len(weight), codes) * codes
    # What the largest number of the codebook is below, as a power of two; the kernel's scales are of the same kind.
    unit = torch.ldexp(torch.ones_like(weight[0, 0]), torch.frexp(weight.abs().max()).exponent - TOP)
    high = weight.new_zeros(size, width, dtype=torch.float16)
    low, half_norms = torch.zeros_like(high), weight.new_full((size,), float("inf"))
    scaled = weight / unit
    high[: len(weight), : x.shape[1]] = scaled
    low[: len(weight), : x.shape[1]] = scaled - scaled.half()
    half_norms[: len(weight)] = 0.5 * weight.square().sum(1)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current one
        _nearest[(triton.cdiv(len(x), rows),)](
            x, weight, high, low, half_norms, unit, out, len(x), len(weight), x.shape[1], depth,
            rows, codes, width, TOP, num_warps=warps,
        )  # fmt: skip
    return out


def nearest_codes_gpu(x: Tensor, weight: Tensor) -> Tensor:
    """Index of the nearest row of weight [K, C] for each row of x [M, C], float32 -> int64 [M]; the lowest on a tie."""
    return residual_codes_gpu(x, weight, 1)[:, 0]
