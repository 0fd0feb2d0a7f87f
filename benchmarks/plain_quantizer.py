"""A residual quantiser as reference repositories have it, for comparison: all distances at once, one-hot updates.

Shapes: M rows, C width, K codes, D depth.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainResidualQuantizer(nn.Module):
    """One EMA codebook shared by D depths; holds M x K distances and M x K one-hot rows."""

    def __init__(self, size: int, width: int, depth: int, decay: float = 0.99):
        super().__init__()
        self.depth, self.decay = depth, decay
        self.register_buffer("weight", torch.randn(size, width) * width**-0.5)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.weight.clone())

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [M, D] of x [M, C]."""
        codes = []
        for _ in range(self.depth):
            codes.append(self._nearest(x))
            x = x - self.weight[codes[-1]]
        return torch.stack(codes, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A training pass: x [M, C] -> straight-through value [M, C] and commitment loss; moves the codebook."""
        residual, total, losses, seen = x.detach(), torch.zeros_like(x), [], []
        for _ in range(self.depth):
            codes = self._nearest(residual)
            seen.append((residual, codes))
            total = total + self.weight[codes]
            losses.append((x - total).square().mean())
            residual = residual - self.weight[codes]
        for rows, codes in seen:
            self._update(rows, codes)
        return x + (total - x).detach(), torch.stack(losses).mean()

    @torch.no_grad()
    def _nearest(self, x: Tensor) -> Tensor:
        norms = x.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        return (norms - 2 * x @ self.weight.t()).argmin(1)

    @torch.no_grad()
    def _update(self, rows: Tensor, codes: Tensor) -> None:
        hot = F.one_hot(codes, len(self.weight)).to(rows.dtype)
        self.counts.mul_(self.decay).add_(hot.sum(0), alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(hot.t() @ rows, alpha=1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
