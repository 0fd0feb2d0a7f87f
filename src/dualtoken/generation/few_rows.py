"""Linear layers of a few rows on a GPU, as Triton kernels that do all that stands around the product.

With one or two pictures a pass reads weights and does little else. So a few programs for each processor of the GPU hold
x, normed, in registers and run over rows of the weight, which are loaded some steps ahead (`num_stages` of the loop);
bias, activation and residual are part of the kernel. A kernel starts while the one before it ends, where the GPU can do
that (programmatic dependent launch, Hopper and later). Figures, and what was tried beside: docs/benchmarks.md, LOG.md.

Shapes: B rows, W width of x, N of what comes out.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    EARLY = True
except ImportError:  # an older Triton
    EARLY = False

ROWS = 4  # beyond, libraries' products are faster
WIDEST = 2**13  # of x whose rows lie in registers whole
TURNS, GATED_TURNS = 4, 3  # programs for each processor of the GPU
AHEAD = 3  # rows of the weight are asked for so many steps before they are used
SILU, GELU, GELU_TANH = 1, 2, 3
RMS, LAYER = 1, 2


@triton.jit
def _before(NEXT: tl.constexpr):
    """What each kernel begins with: NEXT 1 lets the next one in, which waits by itself for what this one writes."""
    if NEXT == 1:
        gdc_launch_dependents()


@triton.jit
def _wait(NEXT: tl.constexpr):
    """Until the kernel before has written all."""
    if NEXT > 0:
        gdc_wait()


@triton.jit
def _after(NEXT: tl.constexpr):
    """What each kernel ends with: NEXT 2 lets the next one in now, so that its programs find all places free."""
    if NEXT == 2:
        gdc_launch_dependents()


@triton.jit
def _active(x, KIND: tl.constexpr):
    if KIND == 1:
        x = x * tl.sigmoid(x)
    if KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == 3:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _linear(
    x, gain, shift, eps, weight, bias, weight_2, bias_2, weight_3, bias_3, residual, out,
    rows, width, size, first_2, first_3, turn_2, turn_3, residual_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """act(norm(x) weight^T + bias) [+ residual] -> out [B, N]; x is no wider than BLOCK_K.

    GATED: times weight_2's product. PARTS 3: outputs from first_2 on are weight_2's, made by programs from turn_2 on;
    those from first_3 on are weight_3's.
    """
    _before(NEXT)
    turn, programs, start, count = tl.program_id(0), tl.num_programs(0), 0, size
    if PARTS == 3:
        count, programs = first_2, turn_2
        if turn >= turn_2:
            weight, bias, start, count, programs = weight_2, bias_2, first_2, first_3 - first_2, turn_3 - turn_2
        if turn >= turn_3:
            weight, bias, start, count = weight_3, bias_3, first_3, size - first_3
            programs = tl.num_programs(0) - turn_3
        turn = tl.where(turn >= turn_3, turn - turn_3, tl.where(turn >= turn_2, turn - turn_2, turn))
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    known = k < width
    _wait(NEXT)
    inside = (row < rows)[:, None] & known[None, :]
    given = tl.load(x + row[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        given = tl.where(inside, given - (tl.sum(given, 1) / width)[:, None], 0.0)
    if NORM > 0:
        given = given * tl.rsqrt(tl.sum(given * given, 1) / width + eps)[:, None]
        given = given * tl.load(gain + k, mask=known, other=0.0).to(tl.float32)[None, :]
    if NORM == 2:
        given = given + tl.load(shift + k, mask=known, other=0.0).to(tl.float32)[None, :]
    for block in tl.range(turn, tl.cdiv(count, BLOCK_N), programs, num_stages=AHEAD):
        at = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = at < count
        place, there_too = at[:, None] * width + k[None, :], there[:, None] & known[None, :]
        w = tl.load(weight + place, mask=there_too, other=0.0)
        made = tl.sum(w.to(tl.float32)[None, :, :] * given[:, None, :], 2)
        if BIAS:
            made += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)[None, :]
        made = _active(made, KIND)
        if GATED:
            w_2 = tl.load(weight_2 + place, mask=there_too, other=0.0)
            up = tl.sum(w_2.to(tl.float32)[None, :, :] * given[:, None, :], 2)
            if BIAS:
                up += tl.load(bias_2 + at, mask=there, other=0.0).to(tl.float32)[None, :]
            made *= up
        mask = (row < rows)[:, None] & there[None, :]
        if RESIDUAL:
            before = tl.load(residual + row[:, None] * residual_stride + at[None, :], mask=mask, other=0.0)
            made += before.to(tl.float32)
        tl.store(out + row[:, None] * size + start + at[None, :], made.to(out.dtype.element_ty), mask=mask)
    _after(NEXT)


@triton.jit
def _wide_linear(
    x, weight, bias, residual, out, rows, width, size, residual_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """x weight^T [+ bias] [+ residual] -> out [B, N], for x of any width."""
    _before(NEXT)
    row, at = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, total = at < size, tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    _wait(NEXT)
    for first in tl.range(0, width, BLOCK_K, num_stages=AHEAD):
        k = first + tl.arange(0, BLOCK_K)
        known = (k < width)[None, :]
        given = tl.load(x + row[:, None] * width + k[None, :], mask=(row < rows)[:, None] & known, other=0.0)
        w = tl.load(weight + at[:, None] * width + k[None, :], mask=there[:, None] & known, other=0.0)
        total += given.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    made, mask = tl.sum(total, 2), (row < rows)[:, None] & there[None, :]
    if BIAS:
        made += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        before = tl.load(residual + row[:, None] * residual_stride + at[None, :], mask=mask, other=0.0)
        made += before.to(tl.float32)
    tl.store(out + row[:, None] * size + at[None, :], made.to(out.dtype.element_ty), mask=mask)
    _after(NEXT)


def holds(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of that width can be normed or gated: registers and shared memory have room for them."""
    return width * dtype.itemsize <= 2 * WIDEST


@lru_cache
def early(device: torch.device) -> bool:
    """Whether kernels may begin before the one before has ended."""
    return EARLY and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel, grid: tuple[int, ...], *arguments, device: torch.device, small_next: bool = False, **options
) -> None:
    """A kernel of ours, begun early where that can be.

    Args: small_next: the kernel after it has few programs, or many that come and go; they may wait beside this one's.
        The programs of others run over all rows at their own speed, so they should be spread evenly.
    """
    if not early(device):
        kernel[grid](*arguments, **options, NEXT=0)
    else:
        kernel[grid](*arguments, **options, NEXT=1 if small_next else 2, launch_pdl=True)


@lru_cache
def processors(device: torch.device) -> int:
    """Of the GPU; few where there is none, so that programs have several turns."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def linear(
    x: Tensor,
    layer: nn.Linear,
    norm: nn.Module | None = None,
    act: int = 0,
    gate: nn.Linear | None = None,
    residual: Tensor | None = None,
    small_next: bool = False,
) -> Tensor:
    """act(layer(norm(x))) [+ residual]; with `gate` act(gate(norm(x))) * layer(norm(x)). x [B, W] -> [B, N].

    Args: norm: an RMS or layer norm over W; act: 0, SILU, GELU or GELU_TANH; residual: [B, N], or [N] for all rows;
        small_next: as in `launch`.
    """
    layers = [layer] if gate is None else [gate, layer]
    return _launched(x, layers, norm, act, gate is not None, residual, small_next)


def three(x: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], norm: nn.Module) -> Tensor:
    """norm(x) through three layers, side by side in [B, N1 + N2 + N3]; the attention comes next."""
    return _launched(x, list(layers), norm, 0, False, None, True)


def _launched(
    x: Tensor, layers: list[nn.Linear], norm: nn.Module | None, act: int, gated: bool, residual: Tensor | None,
    small_next: bool,
) -> Tensor:  # fmt: skip
    (rows, width), sizes = x.shape, [m.out_features for m in layers]
    weights, biases = [m.weight for m in layers], [x if m.bias is None else m.bias for m in layers]
    size, block = sizes[0] if gated else sum(sizes), max(16, triton.next_power_of_2(width))
    some = {"ROWS": triton.next_power_of_2(rows), "BIAS": layers[0].bias is not None, "RESIDUAL": residual is not None}
    some |= {"AHEAD": AHEAD, "device": x.device, "small_next": small_next}
    out, residual = x.new_empty(rows, size), x if residual is None else residual
    stride = size if residual.ndim == 2 else 0
    if block > WIDEST:
        given = x, weights[0], biases[0], residual, out, rows, width, size, stride
        launch(_wide_linear, (triton.cdiv(size, 4),), *given, **some, BLOCK_N=4, BLOCK_K=1024)
        return out
    weights, biases = weights + weights[:1] * (3 - len(layers)), biases + biases[:1] * (3 - len(layers))
    shift = getattr(norm, "bias", None)
    eps = 0.0 if norm is None else getattr(norm, "eps", None) or norm.variance_epsilon
    kind = 0 if norm is None else LAYER if isinstance(norm, nn.LayerNorm) else RMS
    outputs = min(2, max(1, WIDEST // block * 2 // some["ROWS"] // (2 if gated else 1)))
    turns = (GATED_TURNS if gated else TURNS) * processors(x.device)
    parts = 1 if gated or len(layers) == 1 else 3
    turns = max(parts, min(turns, triton.cdiv(size, outputs)))
    second = min(max(1, turns * sizes[0] // size), turns - 2)  # each part has programs by its size, and at least one
    third = min(max(second + 1, turns * sum(sizes[:2]) // size), turns - 1)
    launch(
        _linear, (turns,),
        x, x if norm is None else norm.weight, x if shift is None else shift, eps,
        weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], residual, out,
        rows, width, size, sizes[0], sum(sizes[:2]), second, third, stride, BLOCK_N=outputs, BLOCK_K=block,
        NORM=kind, KIND=act, GATED=gated, PARTS=parts,
        num_warps=4 if block < WIDEST else 8, **some,
    )  # fmt: skip
    return out
