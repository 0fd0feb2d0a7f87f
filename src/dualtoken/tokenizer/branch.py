"""One vocabulary: features of the backbone -> code space -> residual codes -> features again.

The tokenizer holds two instances of `Branch`, `pixel` and `semantic` (paper section 3.2). The projection before
the quantiser sees all positions; the one after it is causal, so that features can be computed from codes position
by position while an image is being generated.

Shapes: B batch, N positions, D depth, C width of the backbone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.tokenizer.quantizers import build_quantizer


@dataclass
class BranchConfig:
    """A branch: its quantiser, and an optional second tap.

    `shortcut_scale` > 0 adds layer `shortcut_layer`, projected, to the latent before quantisation. The paper has no
    such path; its repository adds layer 4 with 0.6. `joined`, of the semantic branch only: it is the pixel branch, one
    codebook for both, as in row (a) of Table 3.
    """

    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    shortcut_scale: float = 0.0
    shortcut_layer: int = 4
    joined: bool = False


@dataclass
class BranchOutput:
    """What a branch makes of features."""

    features: Tensor  # [B, N, C], quantised and projected back
    codes: Tensor  # int64 [B, N, D]
    commitment: Tensor  # scalar
    codebook_loss: Tensor  # scalar
    usage: Tensor  # [D]
    perplexity: Tensor  # [D]


@dataclass
class AttentionCache:
    """Keys and values of the positions done so far, both [B, heads, n, head width]; None before the first."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next position, both [B, heads, 1, head width]; gives all there are."""
        first = self.keys is None
        self.keys = keys if first else torch.cat([self.keys, keys], 2)
        self.values = values if first else torch.cat([self.values, values], 2)
        return self.keys, self.values

    def mask(self) -> Tensor | None:
        """Which of them are seen, as scaled_dot_product_attention takes it; None = all."""
        return None


class FixedCache(AttentionCache):
    """The same with room for N positions at fixed addresses, so that a pass can be recorded and played again.

    `at` (int64 [1], on the device) says which position is added next; whoever made it moves it on, in place.
    """

    def __init__(self, like: "AttentionProjection", batch: int, positions: int, at: Tensor):
        weight = like.qkv.weight
        room = (batch, like.heads, positions, weight.shape[0] // (3 * like.heads))
        super().__init__(weight.new_zeros(room), weight.new_zeros(room))
        self.at, self._numbers = at, torch.arange(positions, device=at.device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As above, but what is given back has places for positions yet to come."""
        self.keys.index_copy_(2, self.at, keys.to(self.keys.dtype))  # autocast gives others than the weights'
        self.values.index_copy_(2, self.at, values.to(self.values.dtype))
        return self.keys.to(keys.dtype), self.values.to(values.dtype)

    def mask(self) -> Tensor:
        """bool [1, 1, 1, N]: positions up to the one that was added last."""
        return (self._numbers <= self.at)[None, None, None]


class GatedMLP(nn.Module):
    """LayerNorm, then GeGLU with a hidden width of twice the output."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class AttentionProjection(nn.Module):
    """An attention block that changes the width: [B, N, in] -> [B, N, out].

    y = proj(norm(x)) + attention(norm(x)); out = y + mlp(norm(y)). There are wide / narrow heads; on the way down
    their outputs are averaged, on the way up they are joined. Raises UserError where the widths do not divide.
    """

    def __init__(self, in_dim: int, out_dim: int, causal: bool):
        super().__init__()
        wide, narrow = max(in_dim, out_dim), min(in_dim, out_dim)
        if wide % narrow:
            raise UserError(f"code_dim {narrow} must divide the backbone's width {wide}")
        self.causal, self.heads, self.down = causal, wide // narrow, in_dim > out_dim
        self.norm_attention = nn.LayerNorm(in_dim)
        self.norm_projection = nn.LayerNorm(in_dim)
        self.norm_mlp = nn.LayerNorm(out_dim)
        self.qkv = nn.Linear(in_dim, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.out = nn.Linear(out_dim, out_dim)
        self.projection = nn.Linear(in_dim, out_dim)
        self.mlp = GatedMLP(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))

    def step(self, x: Tensor, cache: AttentionCache) -> Tensor:
        """One more position x [B, 1, in] -> [B, 1, out] of a causal projection; extends the cache in place."""
        if not self.causal:
            raise UserError("only the causal projection after quantisation can be computed position by position")
        q, k, v = self._heads(x)
        k, v = cache.extend(k, v)
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, cache.mask()))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys, values, each [B, heads, N, head width]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        joined = F.linear(self.norm_attention(x), self.qkv.weight, bias)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joined.chunk(3, -1)]

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """From head outputs [B, heads, N, head width] and the input to the result [B, N, out]."""
        merged = attended.mean(1) if self.down else attended.transpose(1, 2).flatten(2)
        y = self.projection(self.norm_projection(x)) + self.out(merged)
        return y + self.mlp(self.norm_mlp(y))


class Branch(nn.Module):
    """A vocabulary over features of width C; `lookup(encode(x))` equals `forward(x).features` in evaluation."""

    def __init__(self, width: int, config: BranchConfig):
        super().__init__()
        code_dim = config.quantizer.code_dim
        self.shortcut_scale, self.shortcut_layer = config.shortcut_scale, config.shortcut_layer
        self.pre = AttentionProjection(width, code_dim, causal=False)
        self.shortcut = AttentionProjection(width, code_dim, causal=False) if config.shortcut_scale else None
        self.quantizer = build_quantizer(config.quantizer)
        self.post = AttentionProjection(code_dim, width, causal=True)

    def latent(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Features [B, N, C] (and those of the shortcut's layer) -> what is quantised, [B, N, code_dim]."""
        if (self.shortcut is None) != (shortcut is None):
            raise UserError(
                f"shortcut_scale={self.shortcut_scale}, but shortcut features are given only when it is > 0"
            )
        latent = self.pre(features)
        return latent if shortcut is None else latent + self.shortcut_scale * self.shortcut(shortcut)

    def encode(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Codes int64 [B, N, D] of features [B, N, C]."""
        return self.quantizer.encode(self.latent(features, shortcut))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, N, D'] -> features [B, N, C]."""
        return self.post(self.quantizer.lookup(codes))

    def forward(self, features: Tensor, shortcut: Tensor | None = None) -> BranchOutput:
        """Quantise features [B, N, C] with gradients and losses."""
        q = self.quantizer(self.latent(features, shortcut))
        return BranchOutput(self.post(q.quantized), q.codes, q.commitment, q.codebook_loss, q.usage, q.perplexity)
