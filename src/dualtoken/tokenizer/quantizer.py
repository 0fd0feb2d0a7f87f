"""Residual vector quantisation with one codebook shared by all depths (paper section 3.2; Lee et al., 2022).

Each depth codes what the depths before it left over; the sum of the chosen rows approximates the input. What every
kind of quantiser shares stands here too: the config, the result, nearest rows, statistics (`quantizers.py` lists them).

Shapes: B batch, N positions, D depth, C code width, K codebook size, M = B * N rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from dualtoken.core.distributed import all_reduce_sum, rank, world_size
from dualtoken.core.errors import UserError

ROWS = 2**14  # that `encode` takes through all depths at once
CACHED = 2**20  # distances at once on a CPU, whose cache would not hold more
WIDEST = 64  # of rows that the kernel takes unasked: it holds them whole
RUN = 128  # columns among which the least is found first


@dataclass
class QuantizerConfig:
    """Kind, sizes and training rule of a quantiser. A kind ignores the options that are not for it.

    Args:
        kind: "rvq", "mcq", "residual_lfq", "residual_fsq" or "simvq"; see `tokenizer/quantizers.py`.
        codebook_size: K, codes to choose from at each depth. residual_lfq: a power of two; residual_fsq: the product
            of its levels.
        code_dim: width C of what is quantised. mcq: of all codebooks together, a multiple of depth.
        depth: D, codes of a position: residual depths, or for mcq the number of codebooks.
        codebook: rvq: "ema" (rows follow the mean of what they code) or "gradient" (rows are parameters).
        decay: rvq with "ema": of the moving averages.
        restart_below: rvq with "ema": a row whose moving count of uses a step falls below this is replaced by a
            vector of the batch; 0 = never.
        chunk: rvq, mcq, simvq: rows whose distances to all K codes are held at once; on a CPU fewer of a large K.
        search: rvq, mcq, simvq, on a GPU: "blocks" of `chunk` rows, or "triton", one kernel that holds no distances
            (`nearest_gpu.py`); "auto" takes the kernel for rows of at most 64 numbers where Triton works and the GPU
            has the units for it. CPUs always take blocks.
        levels: residual_fsq: values of each of its numbers; default: found between 3 and 8, large ones first.
        entropy_weight: mcq, residual_lfq: of `entropy_loss`, which is added to the codebook loss; 0 = none.
        entropy_temperature: mcq, residual_lfq: of the softmax in it.
    """

    kind: str = "rvq"
    codebook_size: int = 16384
    code_dim: int = 32
    depth: int = 4
    codebook: Literal["ema", "gradient"] = "ema"
    decay: float = 0.99
    restart_below: float = 0.05
    chunk: int = 256
    search: Literal["auto", "blocks", "triton"] = "auto"
    levels: list[int] | None = None
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01

    def __post_init__(self) -> None:
        for name in ("codebook_size", "code_dim", "depth", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"quantizer.{name}={getattr(self, name)} must be at least 1")
        if self.codebook not in ("ema", "gradient"):
            raise UserError(f"quantizer.codebook={self.codebook!r} must be 'ema' or 'gradient'")
        if self.search not in ("auto", "blocks", "triton"):
            raise UserError(f"quantizer.search={self.search!r} must be 'auto', 'blocks' or 'triton'")
        if not 0 < self.decay < 1:
            raise UserError(f"quantizer.decay={self.decay} must lie between 0 and 1")
        if self.entropy_weight < 0 or self.entropy_temperature <= 0:
            raise UserError("quantizer.entropy_weight must be at least 0 and quantizer.entropy_temperature above 0")

    def nearest(self, x: Tensor, weight: Tensor) -> Tensor:
        """Index of the nearest row of weight [K, C] for each row of x [M, C] -> int64 [M], in the chosen way."""
        return nearest_codes(x, weight, self.chunk, self.search)


@dataclass
class Quantized:
    """What a quantiser makes of its input."""

    quantized: Tensor  # [B, N, C], value of lookup(codes), gradient passed straight through to the input
    codes: Tensor  # int64 [B, N, D]
    commitment: Tensor  # scalar, eq. 1: mean over depths of mean((x - sg[sum of the first d rows])^2)
    codebook_loss: Tensor  # scalar, the same with the gradient on the rows, and entropy; 0 for an EMA codebook
    usage: Tensor  # [D], share of the K codes that the batch used at each depth, over all processes
    perplexity: Tensor  # [D], exp of the entropy of the codes at each depth, over all processes


@torch.no_grad()
def nearest_codes(x: Tensor, weight: Tensor, chunk: int, search: str = "blocks") -> Tensor:
    """Index of the nearest row of weight [K, C] for each row of x [M, C] -> int64 [M], lowest index on a tie.

    Holds at most chunk x K distances, never M x K: blocks that stay in the cache are also the faster way.
    """
    if by_kernel(x, search):
        from dualtoken.tokenizer.nearest_gpu import nearest_codes_gpu  # Triton is not on every machine

        return nearest_codes_gpu(x, weight)
    # |x|^2 is the same for every code, so it is left out: argmin of |c|^2 / 2 - x.c
    half_norms = 0.5 * weight.square().sum(1)
    table = weight.t().contiguous()
    # One place for the distances and one for the codes: small results between large ones would let the heap grow.
    chunk = rows_at_once(chunk, len(weight), x.device)
    codes, room = x.new_empty(len(x), dtype=torch.int64), x.new_empty(min(chunk, len(x)), len(weight))
    for rows, found in zip(x.split(chunk), codes.split(chunk), strict=True):
        _argmin(torch.addmm(half_norms, rows, table, alpha=-1, out=room[: len(rows)]), found)
    return codes


def by_kernel(x: Tensor, search: str) -> bool:
    """Whether rows x [..., C] are searched for by the kernel."""
    return x.is_cuda and (
        search == "triton" or (search == "auto" and x.shape[-1] <= WIDEST and kernel_at_hand(x.device))
    )


@lru_cache
def kernel_at_hand(device: torch.device) -> bool:
    """Whether Triton is there and works, and a GPU of NVIDIA's with TF32 units (Ampere and later) for the kernel."""
    ready = find_spec("triton") is not None and torch.version.cuda is not None
    if not ready or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from triton.runtime import driver

        return driver.active.utils is not None
    except Exception:  # here Triton compiles C: no compiler, no Python headers, no driver each raise something else
        return False


def rows_at_once(chunk: int, codes: int, device: torch.device) -> int:
    """Rows of a block: `chunk`, on a CPU so few that their distances to all K codes stay in the cache."""
    return chunk if device.type == "cuda" else max(1, min(chunk, CACHED // codes))


def _argmin(distances: Tensor, found: Tensor) -> None:
    """Where each row of distances [M, K] is least, the first place on a tie, into found int64 [M].

    On a CPU torch's argmin takes as long as the product before it, its amin a twentieth of that; so first the least of
    each run of columns, then the first such run and the first such place in it.
    """
    if distances.is_cuda or distances.shape[1] % RUN:
        torch.argmin(distances, 1, out=found)
        return
    runs = distances.unflatten(1, (-1, RUN))
    which = runs.amin(2).argmin(1)
    inside = runs[torch.arange(len(runs), device=runs.device), which].argmin(1)
    torch.add(inside, which, alpha=RUN, out=found)


def entropy_loss(x: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Scalar, low where each x [M, C] is sure of one of rows [K, C] and the M together use all of them alike.

    Mean entropy of softmax(-|x - row|^2 / temperature), less the entropy of its mean over this process's M.
    """
    logits = -(x.square().sum(1, keepdim=True) - 2 * x @ rows.t() + rows.square().sum(1)) / temperature
    log = logits.log_softmax(1)
    mean = log.logsumexp(0) - math.log(len(x))  # logarithms throughout: a row of no probability gives no 0 * inf
    return (mean.exp() * mean).sum() - (log.exp() * log).sum(1).mean()


def check_codes(codes: Tensor, config: QuantizerConfig) -> None:
    """Raise UserError where codes [..., D'] have more depths than D or reach outside the codebook."""
    depths, size = codes.shape[-1], config.codebook_size
    if depths > config.depth:
        raise UserError(f"codes have {depths} depths, this tokenizer has {config.depth}: wrong model?")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise UserError(f"codes reach {int(codes.max())}, this codebook has {size} rows: wrong model?")


@torch.no_grad()
def usage_and_perplexity(codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Share of the codes used and exp of the entropy, both [D], of codes [B, N, D] over all processes."""
    depths = codes.shape[-1]
    offset = codes + size * torch.arange(depths, device=codes.device)
    counts = all_reduce_sum(torch.bincount(offset.flatten(), minlength=size * depths)).view(depths, size)
    share = counts / counts.sum(1, keepdim=True)
    return (counts > 0).float().mean(1), torch.special.entr(share).sum(1).exp()


class StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first; unlike x + (q - x).detach() it does not round."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Codebook(nn.Module):
    """K rows of width C, moved by moving averages or by the gradient."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        size, width = config.codebook_size, config.code_dim
        weight = torch.randn(size, width) * width**-0.5
        if config.codebook == "gradient":
            self.weight = nn.Parameter(weight)
            return
        self.register_buffer("weight", weight)
        # A warm start (count 1 each): the first update cannot divide by nothing and blow rows up.
        self.register_buffer("cluster_size", torch.ones(size))
        self.register_buffer("embed_sum", weight.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, rows: Tensor, codes: Tensor) -> None:
        """One moving-average step with rows [D, M, C] and their codes [D, M], summed over processes.

        Sums are gathered by index_add, so no one-hot matrix of M x K is built.
        """
        decay, flat = self.config.decay, codes.flatten()
        counts = all_reduce_sum(torch.bincount(flat, minlength=len(self.weight)).to(self.weight.dtype))
        sums = all_reduce_sum(torch.zeros_like(self.weight).index_add_(0, flat, rows.flatten(0, 1)))
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embed_sum.mul_(decay).add_(sums, alpha=1 - decay)
        self.updates += 1
        if self.config.restart_below > 0:
            self._restart(rows)
        self.weight.copy_(self.embed_sum / self.cluster_size.clamp(min=1e-5)[:, None])

    def _restart(self, rows: Tensor) -> None:
        """Replace unused rows by vectors of the joined batch; equal on all processes and for any number of them.

        The draw depends on the saved count of updates alone, so a resumed run draws the same and the global
        random state is left as it is.
        """
        unused = (self.cluster_size < self.config.restart_below).nonzero()[:, 0]
        if len(unused) == 0:
            return
        depths, local, width = rows.shape
        generator = torch.Generator().manual_seed(int(self.updates))
        depth = torch.randint(depths, (len(unused),), generator=generator).to(rows.device)
        row = torch.randint(local * world_size(), (len(unused),), generator=generator).to(rows.device)
        mine = row // local == rank()
        drawn = rows.new_zeros(len(unused), width)
        drawn[mine] = rows[depth[mine], row[mine] % local]
        self.embed_sum[unused] = all_reduce_sum(drawn)
        self.cluster_size[unused] = 1.0


class ResidualQuantizer(nn.Module):
    """D depths over one shared codebook.

    `lookup(encode(x))` equals the quantised x bit for bit, and the codes of the first d depths do not depend on D.
    """

    shared = True  # one codebook for all depths

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.codebook = Codebook(config)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, C]; in training mode an EMA codebook takes one step after all depths."""
        with torch.autocast(x.device.type, enabled=False):
            dtype, x = x.dtype, x.float()
            residuals, chosen = zip(*self._search(x.detach()), strict=True)
            codes = torch.stack(chosen, -1)
            total, sums = torch.zeros_like(x), []
            for depth in range(self.config.depth):
                total = total + self.codebook.weight[codes[..., depth]]
                sums.append(total)
            commitment = torch.stack([(x - total.detach()).square().mean() for total in sums]).mean()
            codebook_loss = x.new_zeros(())
            if self.config.codebook == "gradient":
                codebook_loss = torch.stack([(x.detach() - total).square().mean() for total in sums]).mean()
            quantized = StraightThrough.apply(x, sums[-1].detach())
            if self.training and self.config.codebook == "ema":
                self.codebook.update(torch.stack(residuals).flatten(1, 2), codes.flatten(0, 1).t())
            statistics = usage_and_perplexity(codes, self.config.codebook_size)
            return Quantized(quantized.to(dtype), codes, commitment, codebook_loss, *statistics)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [B, N, D] of x [B, N, C]; all depths of a block of rows after another, so memory stays flat."""
        codes = torch.empty(*x.shape[:-1], self.config.depth, dtype=torch.int64, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            if by_kernel(x, self.config.search):
                from dualtoken.tokenizer.nearest_gpu import residual_codes_gpu

                weight = self.codebook.weight.float()
                return residual_codes_gpu(x.flatten(0, -2).float(), weight, self.config.depth).view(codes.shape)
            for rows, found in zip(x.flatten(0, -2).split(ROWS), codes.flatten(0, -2).split(ROWS), strict=True):
                for depth, (_, chosen) in enumerate(self._search(rows.float())):
                    found[:, depth] = chosen
        return codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the rows of codes [..., D'] -> [..., C], for any D' up to D.

        Raises UserError for more depths than D or a code outside the codebook.
        """
        check_codes(codes, self.config)
        return self.rows_of(codes)

    def rows_of(self, codes: Tensor) -> Tensor:
        """`lookup` of codes known to be good, without waiting for the device to look at them."""
        total = self.codebook.weight.new_zeros(*codes.shape[:-1], self.config.code_dim)
        for depth in range(codes.shape[-1]):
            total = total + self.codebook.weight[codes[..., depth]]
        return total

    def _search(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Depth by depth the residual [B, N, C] that it sees, and the codes [B, N] that it chooses."""
        weight, residual = self.codebook.weight.detach().float(), x
        for _ in range(self.config.depth):
            chosen = self.config.nearest(residual.flatten(0, -2), weight).view(x.shape[:-1])
            yield residual, chosen
            residual = residual - weight[chosen]
