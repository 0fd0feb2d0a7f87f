"""Quantisers of the library vector-quantize-pytorch (optional): residual LFQ, residual FSQ and SimVQ.

The library holds weights and grids, and codes and values are its own. Gradient and losses are ours, so that the kinds
differ in nothing else: one straight-through step over the sum of all depths (the library's passes the gradient on once
a depth, D times in all), and eq. 1 as for the residual quantiser.

Shapes: B batch, N positions, D depth, C code width, K codebook size, L width that the library quantises in.
"""

from abc import ABC, abstractmethod
from types import ModuleType

import torch
from torch import Tensor, nn

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.quantizer import (
    Quantized,
    QuantizerConfig,
    StraightThrough,
    check_codes,
    entropy_loss,
    usage_and_perplexity,
)


def _library(config: QuantizerConfig) -> ModuleType:
    """The library. Raises UserError where it is not installed."""
    try:
        import vector_quantize_pytorch
    except ModuleNotFoundError:
        raise UserError(
            f"quantizer.kind={config.kind} needs the package vector-quantize-pytorch: "
            "pip install 'dualtoken[quantizers]'"
        ) from None
    return vector_quantize_pytorch


def find_levels(size: int, largest: int = 8) -> list[int] | None:
    """Levels of 3 to `largest`, large ones first, whose product is `size`; None where there are none.

    Gives those of the FSQ paper for its sizes (240 = 8 x 6 x 5, 1000 = 8 x 5 x 5 x 5, ...), and 4s and 8s for 2^n.
    """
    if size == 1:
        return []
    for level in range(min(largest, size), 2, -1):
        rest = find_levels(size // level, level) if size % level == 0 else None
        if rest is not None:
            return [level, *rest]
    return None


class _LibraryQuantizer(nn.Module, ABC):
    """x [B, N, C] -> latent [B, N, L] -> D depths of the library's `inner` -> back to C."""

    shared = False

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        library = _library(config)
        with torch.device("cpu"):  # the library computes with the values of its constants, which "meta" has none of
            self.inner = self._build(library)
        # The library's constants are not stored with its weights, and transformers loads into modules without values.
        # It then looks after modules that have a buffer of that sort themselves, hence the empty one.
        stored = self.inner.state_dict()
        self._constants = {n: b.clone() for n, b in self.inner.named_buffers() if n not in stored}
        self.register_buffer("_empty", torch.zeros(0), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Put the constants back (called after loading)."""
        for name, value in self._constants.items():
            self.inner.get_buffer(name).copy_(value)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, C]."""
        with torch.autocast(x.device.type, enabled=False):
            latent, codes = self._latent(x.to(self._dtype)), self.encode(x)
            sums = self._sums(codes)
            quantized = self._out(StraightThrough.apply(latent, sums[-1].detach()))
            statistics = usage_and_perplexity(codes, self.config.codebook_size)
            return Quantized(quantized.to(x.dtype), codes, *self._losses(latent, sums), *statistics)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [B, N, D] of x [B, N, C]."""
        with torch.autocast(x.device.type, enabled=False):
            self.inner.eval()  # in training mode it would compute losses that are not used
            return self._search(x.to(self._dtype)).long()

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the rows of codes [..., D'], projected -> [..., C], for any D' up to D.

        Raises UserError for more depths than D or a code outside the codebook.
        """
        check_codes(codes, self.config)
        return self.rows_of(codes)

    def rows_of(self, codes: Tensor) -> Tensor:
        """`lookup` of codes known to be good, without waiting for the device to look at them."""
        return self._out(self._sums(codes)[-1])

    @abstractmethod
    def _build(self, library: ModuleType) -> nn.Module:
        """The library's quantiser. Raises UserError for sizes that it cannot have."""

    @abstractmethod
    def _rows(self, codes: Tensor, depth: int) -> Tensor:
        """What codes [...] of one depth (from 0) stand for, [..., L]."""

    @abstractmethod
    def _losses(self, latent: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Commitment and codebook loss of latent [B, N, L] and the sums [D, B, N, L] of the first 1 to D rows."""

    def _latent(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, L]."""
        return self.inner.project_in(x)

    def _out(self, latent: Tensor) -> Tensor:
        """[..., L] -> [..., C]."""
        return self.inner.project_out(latent)

    def _search(self, x: Tensor) -> Tensor:
        """Codes [B, N, D]."""
        return self.inner(x)[1]

    def _sums(self, codes: Tensor) -> Tensor:
        """Sums of the first 1 to D' rows [D', ..., L] of codes [..., D']."""
        return torch.stack([self._rows(codes[..., depth], depth) for depth in range(codes.shape[-1])]).cumsum(0)

    @property
    def _dtype(self) -> torch.dtype:
        tensors = (*self.inner.parameters(), *self.inner.buffers())
        return next(t.dtype for t in tensors if t.is_floating_point())


class LookupFreeQuantizer(_LibraryQuantizer):
    """Residual LFQ: a code is the signs of log2 K numbers, of half the size at each further depth."""

    def _build(self, library: ModuleType) -> nn.Module:
        size = self.config.codebook_size
        if size < 2 or size & (size - 1):
            below = 2 ** max(1, size.bit_length() - 1)
            raise UserError(
                f"quantizer.codebook_size={size} is no power of two, which residual_lfq needs: "
                f"give {below} or {2 * below}"
            )
        return library.ResidualLFQ(dim=self.config.code_dim, codebook_size=size, num_quantizers=self.config.depth)

    def _rows(self, codes: Tensor, depth: int) -> Tensor:
        return self.inner.layers[depth].codebook[codes]

    def _losses(self, latent: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        codebook_loss = latent.new_zeros(())
        if self.config.entropy_weight > 0:
            residuals = latent - torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
            pairs = zip(residuals.flatten(1, 2), self.inner.codebooks, strict=True)
            entropies = [entropy_loss(rows, book, self.config.entropy_temperature) for rows, book in pairs]
            codebook_loss = self.config.entropy_weight * torch.stack(entropies).mean()
        return (latent - sums).square().mean(), codebook_loss


class ScalarQuantizer(_LibraryQuantizer):
    """Residual FSQ: a code is a few numbers rounded to levels, finer at each further depth; it has no losses."""

    def _build(self, library: ModuleType) -> nn.Module:
        size, levels = self.config.codebook_size, self.config.levels or find_levels(self.config.codebook_size)
        if not levels:
            near = next((n for n in range(size, 2, -1) if find_levels(n)), 3)
            raise UserError(
                f"quantizer.codebook_size={size} is no product of levels 3 to 8, which residual_fsq needs: "
                f"give {near}, or quantizer.levels and their product"
            )
        product = int(torch.tensor(levels).prod())
        if product != size or min(levels) < 2:
            raise UserError(
                f"quantizer.levels={list(levels)} make {product} codes, quantizer.codebook_size is {size}: give levels "
                f"of at least 2 and quantizer.codebook_size {product}"
            )
        return library.ResidualFSQ(
            levels=list(levels), dim=self.config.code_dim, num_quantizers=self.config.depth, bound_hard_clamp=True
        )

    def _rows(self, codes: Tensor, depth: int) -> Tensor:
        return self.inner.layers[depth].implicit_codebook[codes] * self.inner.scales[depth]

    def _latent(self, x: Tensor) -> Tensor:
        bound = self.inner.soft_clamp_input_value  # the library's own; levels and half a step beyond
        return (self.inner.project_in(x) / bound).tanh() * bound

    def _losses(self, latent: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        return latent.new_zeros(()), latent.new_zeros(())


class SimpleQuantizer(_LibraryQuantizer):
    """Residual SimVQ: frozen random rows under one learned matrix a depth, so that all rows move together."""

    def _build(self, library: ModuleType) -> nn.Module:
        return library.ResidualSimVQ(
            dim=self.config.code_dim, codebook_size=self.config.codebook_size, num_quantizers=self.config.depth
        )

    def _rows(self, codes: Tensor, depth: int) -> Tensor:
        layer = self.inner.layers[depth]
        return layer.code_transform(layer.frozen_codebook[codes])

    def _losses(self, latent: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        return (latent - sums.detach()).square().mean(), (latent.detach() - sums).square().mean()

    def _latent(self, x: Tensor) -> Tensor:
        return x

    def _out(self, latent: Tensor) -> Tensor:
        return latent

    def _search(self, x: Tensor) -> Tensor:
        # Not the library's search, which holds M x K distances and has none for 16 bits.
        residual, codes = x.float().flatten(0, 1), []
        for layer in self.inner.layers:
            book = layer.codebook.float()
            codes.append(self.config.nearest(residual, book))
            residual = residual - book[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:2], -1)
