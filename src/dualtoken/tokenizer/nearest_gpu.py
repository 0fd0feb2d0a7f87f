"""Nearest rows of a codebook on a GPU, as one Triton kernel: distances stay in registers, as does the best so far.

Each program takes BLOCK_M rows of x and runs over the codebook BLOCK_K rows at a time; neither M x K distances nor a
block of them is ever written to memory. Products are of float32 exactness, made of three TF32 products: with one, other
codes would win; without the tensor cores it takes three times as long (LOG.md).
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K, FEW = 128, 2**13  # fewer rows than that in smaller blocks, so that all of the GPU has some


@triton.jit
def _nearest(
    x, table, half_norms, out, rows, codes, width,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    given = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    best = tl.full((BLOCK_M,), float("inf"), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, codes, BLOCK_K):
        code = first + tl.arange(0, BLOCK_K)
        there = (code < codes)[None, :] & (column < width)[:, None]
        block = tl.load(table + code[None, :] * width + column[:, None], mask=there, other=0.0)
        norms = tl.load(half_norms + code, mask=code < codes, other=float("inf"))
        distances = norms[None, :] - tl.dot(given, block, input_precision="tf32x3")
        least, index = tl.min(distances, 1, return_indices=True, return_indices_tie_break_left=True)
        closer = least < best  # on a tie the earlier block stays
        chosen = tl.where(closer, first + index, chosen)
        best = tl.where(closer, least, best)
    tl.store(out + row, chosen.to(tl.int64), mask=row < rows)


def nearest_codes_gpu(x: Tensor, weight: Tensor) -> Tensor:
    """Index of the nearest row of weight [K, C] for each row of x [M, C], float32 -> int64 [M]; the lowest on a tie."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x):
        block = 16 if len(x) < FEW else 64
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current one
            _nearest[(triton.cdiv(len(x), block),)](
                x, weight, 0.5 * weight.square().sum(1), out, len(x), len(weight), x.shape[1],
                block, BLOCK_K, max(16, triton.next_power_of_2(x.shape[1])),
            )  # fmt: skip
    return out
