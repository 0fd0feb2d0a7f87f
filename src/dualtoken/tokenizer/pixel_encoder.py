"""A convolutional encoder of the VQGAN family (Esser et al., 2021), for the dual-encoder baseline (appendix F.4).

With it the pixel vocabulary no longer comes from shallow layers of the semantic backbone but from a network of its
own: two encoders, one `DualCodes`, so everything after the tokenizer takes the baseline as it is.

Shapes: B batch, h side of the grid of positions, N = h * h, C width of the backbone.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.decoder import ResidualBlock, SpatialAttention, normalization


@dataclass
class PixelEncoderConfig:
    """Sizes of the encoder; the defaults mirror the decoder's.

    Args:
        channels: width at full resolution; level i, from full resolution down, has channels * multipliers[i].
        multipliers: one a level; the grid's side is the image's / 2 ** (levels - 1).
        blocks: residual blocks a level.
        attention: how many of the coarsest levels have attention after each block.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: int = 1


class PixelEncoder(nn.Module):
    """Images [B, 3, H, W] -> pixel features [B, N, C], where N fits the grid of the semantic encoder.

    Raises UserError where the image's side does not halve to the grid's.
    """

    def __init__(self, image_size: int, grid: int, width: int, config: PixelEncoderConfig):
        super().__init__()
        halvings = len(config.multipliers) - 1
        if grid * 2**halvings != image_size:
            raise UserError(
                f"pixel_encoder.multipliers: {halvings} halvings take {image_size} px to {image_size / 2**halvings:g} "
                f"positions a side, the semantic encoder has {grid}"
            )
        widths = [config.channels * m for m in config.multipliers]  # fine to coarse
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        levels: list[nn.Module] = []
        for level, out in enumerate(widths):
            before = widths[max(level - 1, 0)]
            if level:
                levels.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
            for block in range(config.blocks):
                levels.append(ResidualBlock(out if block else before, out))
                if level >= len(widths) - config.attention:
                    levels.append(SpatialAttention(out))
        last = widths[-1]
        self.levels = nn.Sequential(*levels)
        self.middle = nn.Sequential(ResidualBlock(last, last), SpatialAttention(last), ResidualBlock(last, last))
        self.norm_out = normalization(last)
        self.conv_out = nn.Conv2d(last, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x))).flatten(2).transpose(1, 2)
