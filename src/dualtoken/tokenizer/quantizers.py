"""The kinds of quantisers by name. Another kind is another entry; what each must offer is in `Quantizer`.

Shapes: B batch, N positions, D depth, C code width, K codebook size.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.library_quantizers import LookupFreeQuantizer, ScalarQuantizer, SimpleQuantizer
from dualtoken.tokenizer.multi_codebook import MultiCodebookQuantizer
from dualtoken.tokenizer.quantizer import Quantized, QuantizerConfig, ResidualQuantizer


class Quantizer(Protocol):
    """What a branch, heads, storage and reports use of a quantiser; it is a module besides."""

    config: QuantizerConfig  # its codebook_size K, depth D and code_dim C hold for any kind
    shared: bool  # whether a code means the same row at every depth

    def forward(self, x: Tensor) -> Quantized:
        """Quantise x [B, N, C] with gradients and losses."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [B, N, D] of x [B, N, C]; those of `forward`."""

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [..., D'] of the first D' <= D depths -> [..., C]; for all D what `forward` quantises to."""

    def rows_of(self, codes: Tensor) -> Tensor:
        """`lookup` without its checks: for codes that were just drawn, and must not be waited for."""


QUANTIZERS: dict[str, Callable[[QuantizerConfig], nn.Module]] = {
    "rvq": ResidualQuantizer,
    "mcq": MultiCodebookQuantizer,
    "residual_lfq": LookupFreeQuantizer,
    "residual_fsq": ScalarQuantizer,
    "simvq": SimpleQuantizer,
}


def build_quantizer(config: QuantizerConfig) -> nn.Module:
    """The quantiser of a config. Raises UserError for an unknown kind and for sizes that the kind cannot have."""
    if config.kind not in QUANTIZERS:
        raise UserError(f"quantizer.kind={config.kind!r}: the kinds are {', '.join(QUANTIZERS)}")
    return QUANTIZERS[config.kind](config)
