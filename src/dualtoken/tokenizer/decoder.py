"""From pixel features back to an image: a convolutional decoder of the VQGAN family (Esser et al., 2021).

The positions become a map, the map is resampled where its side does not fit the image (27 -> 24 for 384 px), and
each level but the last doubles the side.

Shapes: B batch, N = grid * grid positions, C width of the backbone, h = side of a map.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.errors import UserError


@dataclass
class DecoderConfig:
    """Sizes of the decoder.

    Args:
        channels: width at full resolution; level i, from full resolution down, has channels * multipliers[i].
        multipliers: one per level; the image's side is the latent's times 2 ** (levels - 1).
        blocks: residual blocks a level.
        z_channels: width at which features enter.
        attention: how many of the coarsest levels have attention after each block.
        latent_size: side to which the grid of codes is resampled; None = as it is.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    z_channels: int = 256
    attention: int = 1
    latent_size: int | None = None


def normalization(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, of fewer where there are fewer channels."""
    groups = min(32, channels)
    if channels % groups:
        raise UserError(f"decoder width {channels} must be a multiple of {groups}: change channels or multipliers")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, around a skip: [B, in, h, h] -> [B, out, h, h]."""

    def __init__(self, in_channels: int, out_channels: int, first_kernel: int = 3):
        super().__init__()
        self.norm1 = normalization(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2)
        self.norm2 = normalization(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """One-head self-attention over the h * h places of a map, with a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = normalization(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(attended.transpose(1, 2).view_as(x))


class Level(nn.Module):
    """Blocks at one resolution, then, but for the last level, a doubling of the side."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1]) for i in range(blocks))
        kind = SpatialAttention if attention else nn.Identity
        self.attention = nn.ModuleList(kind(out_channels) for _ in range(blocks))
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x))
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    """Pixel features [B, N, C] -> images [B, 3, H, W], about -1 to 1 and not clamped."""

    def __init__(self, width: int, grid: int, config: DecoderConfig):
        super().__init__()
        self.grid, self.latent = grid, config.latent_size or grid
        self.image_size = self.latent * 2 ** (len(config.multipliers) - 1)
        widths = [config.channels * m for m in reversed(config.multipliers)]  # coarse to fine
        self.entry = ResidualBlock(width, config.z_channels, first_kernel=1)
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[0]), SpatialAttention(widths[0]), ResidualBlock(widths[0], widths[0])
        )
        last = len(widths) - 1
        self.levels = nn.Sequential(
            *(
                Level(widths[max(i - 1, 0)], out, config.blocks, i < config.attention, i < last)
                for i, out in enumerate(widths)
            )
        )
        self.norm_out = normalization(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adversarial loss is balanced against the reconstruction loss."""
        return self.conv_out.weight

    def forward(self, features: Tensor) -> Tensor:
        batch, positions, width = features.shape
        if positions != self.grid**2:
            raise UserError(f"decoder given {positions} positions, its grid is {self.grid} x {self.grid}")
        x = features.transpose(1, 2).reshape(batch, width, self.grid, self.grid)
        if self.latent != self.grid:
            x = F.interpolate(x, size=(self.latent, self.latent), mode="bilinear", align_corners=False)
        x = self.levels(self.middle(self.conv_in(self.entry(x))))
        return self.conv_out(F.silu(self.norm_out(x)))
