"""Residual vector quantisation with one codebook shared by all depths (paper section 3.2; Lee et al., 2022).

Each depth codes what the depths before it left over; the sum of the chosen rows approximates the input.

Shapes: B batch, N positions, D depth, C code width, K codebook size, M = B * N rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dualtoken.core.distributed import all_reduce_sum, rank, world_size
from dualtoken.core.errors import UserError


@dataclass
class QuantizerConfig:
    """Sizes and training rule of a residual quantiser.

    Args:
        codebook: "ema" (rows follow the mean of what they code) or "gradient" (rows are parameters).
        decay: of the moving averages.
        restart_below: a row whose moving count of uses a step falls below this is replaced by a vector of the
            batch; 0 = never.
        chunk: rows whose distances to all K codes are held at once.
    """

    codebook_size: int = 16384
    code_dim: int = 32
    depth: int = 4
    codebook: Literal["ema", "gradient"] = "ema"
    decay: float = 0.99
    restart_below: float = 0.05
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("codebook_size", "code_dim", "depth", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"quantizer.{name}={getattr(self, name)} must be at least 1")
        if self.codebook not in ("ema", "gradient"):
            raise UserError(f"quantizer.codebook={self.codebook!r} must be 'ema' or 'gradient'")
        if not 0 < self.decay < 1:
            raise UserError(f"quantizer.decay={self.decay} must lie between 0 and 1")


@dataclass
class Quantized:
    """What a quantiser makes of its input."""

    quantized: Tensor  # [B, N, C], value of lookup(codes), gradient passed straight through to the input
    codes: Tensor  # int64 [B, N, D]
    commitment: Tensor  # scalar, eq. 1: mean over depths of mean((x - sg[sum of the first d rows])^2)
    codebook_loss: Tensor  # scalar, the same with the gradient on the rows; 0 for an EMA codebook
    usage: Tensor  # [D], share of the K codes that the batch used at each depth, over all processes
    perplexity: Tensor  # [D], exp of the entropy of the codes at each depth, over all processes


def nearest_codes(x: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Index of the nearest row of weight [K, C] for each row of x [M, C] -> int64 [M], lowest index on a tie.

    Holds chunk x K distances, never M x K: blocks of that size stay in the cache, which is also the faster way.
    """
    # |x|^2 is the same for every code, so it is left out: argmin of |c|^2 / 2 - x.c
    half_norms = 0.5 * weight.square().sum(1)
    table = weight.t().contiguous()
    parts = [torch.addmm(half_norms, rows, table, alpha=-1).argmin(1) for rows in x.split(chunk)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.int64)


class _StraightThrough(torch.autograd.Function):
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

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.codebook = Codebook(config)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, C]; in training mode an EMA codebook takes one step after all depths."""
        with torch.autocast(x.device.type, enabled=False):
            dtype, x = x.dtype, x.float()
            residuals, codes = self._search(x.detach())
            total, sums = torch.zeros_like(x), []
            for depth in range(self.config.depth):
                total = total + self.codebook.weight[codes[..., depth]]
                sums.append(total)
            commitment = torch.stack([(x - total.detach()).square().mean() for total in sums]).mean()
            codebook_loss = x.new_zeros(())
            if self.config.codebook == "gradient":
                codebook_loss = torch.stack([(x.detach() - total).square().mean() for total in sums]).mean()
            quantized = _StraightThrough.apply(x, sums[-1].detach())
            if self.training and self.config.codebook == "ema":
                self.codebook.update(residuals.flatten(1, 2), codes.flatten(0, 1).t())
            usage, perplexity = self._statistics(codes)
            return Quantized(quantized.to(dtype), codes, commitment, codebook_loss, usage, perplexity)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [B, N, D] of x [B, N, C]."""
        return self._search(x.float())[1]

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the rows of codes [..., D'] -> [..., C], for any D' up to D.

        Raises UserError for more depths than D or a code outside the codebook.
        """
        depths, size = codes.shape[-1], self.config.codebook_size
        if depths > self.config.depth:
            raise UserError(f"codes have {depths} depths, this tokenizer has {self.config.depth}: wrong model?")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise UserError(f"codes reach {int(codes.max())}, this codebook has {size} rows: wrong model?")
        total = self.codebook.weight.new_zeros(*codes.shape[:-1], self.config.code_dim)
        for depth in range(depths):
            total = total + self.codebook.weight[codes[..., depth]]
        return total

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals [D, B, N, C] that each depth saw, and codes [B, N, D]."""
        weight = self.codebook.weight.detach().float()
        residual, residuals, codes = x, [], []
        for _ in range(self.config.depth):
            chosen = nearest_codes(residual.flatten(0, -2), weight, self.config.chunk).view(x.shape[:-1])
            residuals.append(residual)
            codes.append(chosen)
            residual = residual - weight[chosen]
        return torch.stack(residuals), torch.stack(codes, -1)

    @torch.no_grad()
    def _statistics(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Usage and perplexity per depth, both [D], of codes [B, N, D]."""
        size, depths = self.config.codebook_size, codes.shape[-1]
        offset = codes + size * torch.arange(depths, device=codes.device)
        counts = all_reduce_sum(torch.bincount(offset.flatten(), minlength=size * depths)).view(depths, size)
        share = counts / counts.sum(1, keepdim=True)
        return (counts > 0).float().mean(1), torch.special.entr(share).sum(1).exp()
