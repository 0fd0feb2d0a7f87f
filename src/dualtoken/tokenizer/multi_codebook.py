"""Multi-codebook quantisation (UniTok: Ma et al., 2025; Table 10 (c) of the paper).

The C numbers of a position are cut into D equal parts, and each part has a codebook of its own. Parts and rows are
compared by direction only: what is passed on is the row of unit length.

Shapes: B batch, N positions, D codebooks, C code width, K codebook size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.quantizer import (
    Quantized,
    QuantizerConfig,
    StraightThrough,
    check_codes,
    entropy_loss,
    usage_and_perplexity,
)


class MultiCodebookQuantizer(nn.Module):
    """D codebooks of K x C / D, trained by gradient; the first D' codes give the first D' parts.

    With b = losses.commitment / losses.codebook, `b * commitment + codebook_loss` is UniTok's loss (its b is 0.25).
    """

    shared = False

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        if config.code_dim % config.depth:
            raise UserError(
                f"quantizer.code_dim={config.code_dim} cannot be cut into quantizer.depth={config.depth} equal parts, "
                f"one for each codebook of mcq: give a multiple of {config.depth}"
            )
        self.config = config
        self.codebooks = nn.Parameter(torch.randn(config.depth, config.codebook_size, config.code_dim // config.depth))

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, C]. Losses are means over codebooks, between vectors of unit length."""
        with torch.autocast(x.device.type, enabled=False):
            parts, rows = self._parts(x), self._rows()
            codes = self._search(parts, rows)
            chosen = self._chosen(codes, rows)
            codebook_loss = (parts.detach() - chosen).square().mean()
            if self.config.entropy_weight > 0:
                pairs = zip(parts.flatten(0, 1).unbind(1), rows, strict=True)
                entropies = [entropy_loss(part, book, self.config.entropy_temperature) for part, book in pairs]
                codebook_loss = codebook_loss + self.config.entropy_weight * torch.stack(entropies).mean()
            quantized = StraightThrough.apply(parts, chosen.detach()).flatten(2).to(x.dtype)
            commitment = (parts - chosen.detach()).square().mean()
            statistics = usage_and_perplexity(codes, self.config.codebook_size)
            return Quantized(quantized, codes, commitment, codebook_loss, *statistics)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [B, N, D] of x [B, N, C]."""
        with torch.autocast(x.device.type, enabled=False):
            return self._search(self._parts(x), self._rows())

    def lookup(self, codes: Tensor) -> Tensor:
        """Rows of codes [..., D'] side by side -> [..., C]; parts without a code are 0.

        Raises UserError for more codes than D or one outside its codebook.
        """
        check_codes(codes, self.config)
        return self.rows_of(codes)

    def rows_of(self, codes: Tensor) -> Tensor:
        """`lookup` of codes known to be good, without waiting for the device to look at them."""
        found = self._chosen(codes, self._rows()).flatten(-2)
        return F.pad(found, (0, self.config.code_dim - found.shape[-1])).to(self.codebooks.dtype)

    def _parts(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> its parts at unit length [B, N, D, C / D]."""
        return F.normalize(x.float().unflatten(-1, (self.config.depth, -1)), dim=-1)

    def _rows(self) -> Tensor:
        """All rows at unit length [D, K, C / D]."""
        return F.normalize(self.codebooks.float(), dim=-1)

    def _chosen(self, codes: Tensor, rows: Tensor) -> Tensor:
        """Rows of codes [..., D'] -> [..., D', C / D]."""
        return rows[torch.arange(codes.shape[-1], device=codes.device), codes]

    def _search(self, parts: Tensor, rows: Tensor) -> Tensor:
        """Codes [B, N, D]; at unit length the nearest row is the one of the largest cosine."""
        found = [
            self.config.nearest(part.detach(), book.detach()).view(parts.shape[:2])
            for part, book in zip(parts.flatten(0, 1).unbind(1), rows, strict=True)
        ]
        return torch.stack(found, -1)
