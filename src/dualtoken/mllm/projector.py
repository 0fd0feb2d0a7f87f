"""From the features of both vocabularies to one embedding of the LLM (paper section 3.3, appendix D).

Shapes: M images, N positions, C width of the tokenizer, E of its code vectors, H width of the LLM.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dualtoken.core.errors import UserError


@dataclass
class ProjectorConfig:
    """How features become embeds.

    Args:
        order: "concat_first" joins pixel and semantic features, then projects (appendix D: 2048 -> 2048 -> 2048);
            "project_first" projects each to half the width, then joins (section 3.3).
        places: add a learned embedding to each of the N positions. The paper has none; a small LLM that has not
            learnt to count from its rotary positions needs it to know where in the picture it is.
        sums: beside the features also the sums of codebook rows that they are made of, as they are. The paper has
            features alone; the attention between quantiser and features hides the codes of deeper depths, which a
            model needs to copy a picture (LOG.md).
    """

    order: Literal["concat_first", "project_first"] = "concat_first"
    places: bool = False
    sums: bool = False


def two_layers(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """Linear, GELU, linear: the form of all projectors (appendix F.4)."""
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))


class Projector(nn.Module):
    """Pixel and semantic features, both [M, N, C] -> embeds [M, N, H]; the sequence does not grow.

    With `sums` behind the C numbers of a position stand the E of its sum, [M, N, C + E].

    Features are normalised first, each vocabulary on its own: tokenizers give them at any scale, and embeds far larger
    than those of text would drown what the layers of the LLM add to them.
    """

    def __init__(
        self, in_dim: int, out_dim: int, positions: int, config: ProjectorConfig, code_dims: tuple[int, int] = (0, 0)
    ):
        super().__init__()
        if config.order not in ("concat_first", "project_first"):
            raise UserError(f"projector.order={config.order!r} must be 'concat_first' or 'project_first'")
        self.norm_pixel, self.norm_semantic = nn.LayerNorm(in_dim), nn.LayerNorm(in_dim)
        self.joint = self.pixel = self.semantic = None
        self.in_dim, self.widths = in_dim, [in_dim + config.sums * code_dim for code_dim in code_dims]
        if config.order == "concat_first":
            self.joint = two_layers(sum(self.widths), out_dim, out_dim)
        else:
            half = out_dim // 2
            self.pixel = two_layers(self.widths[0], half, half)
            self.semantic = two_layers(self.widths[1], out_dim - half, out_dim - half)
        self.places = nn.Parameter(torch.randn(positions, out_dim) * 0.02) if config.places else None

    def forward(self, pixel: Tensor, semantic: Tensor, first: int | Tensor = 0) -> Tensor:
        """Features of positions `first` (a number, or int64 [1] on the device), `first` + 1, ... -> embeds."""
        pixel, semantic = self._normed(self.norm_pixel, pixel), self._normed(self.norm_semantic, semantic)
        if self.joint is not None:
            embeds = self.joint(torch.cat([pixel, semantic], -1))
        else:
            embeds = torch.cat([self.pixel(pixel), self.semantic(semantic)], -1)
        if self.places is None:
            return embeds
        if isinstance(first, int):
            return embeds + self.places[first : first + pixel.shape[1]]
        return embeds + self.places[first + torch.arange(pixel.shape[1], device=first.device)]

    def _normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """The features normalised, the sums as they are."""
        return torch.cat([norm(x[..., : self.in_dim]), x[..., self.in_dim :]], -1)
