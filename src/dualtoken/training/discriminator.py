"""The adversarial term of the reconstruction loss (paper eq. 3): a patch discriminator (Isola et al., 2017).

Shapes: B batch, H and W sides of the image, h side of the map of patch logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.distributed import all_reduce_mean


@dataclass
class DiscriminatorConfig:
    """Args: channels: width of the first layer; layers: strided ones, each halves the side; start: step (from 0)
    from which the adversarial loss counts and the discriminator learns."""

    channels: int = 64
    layers: int = 3
    start: int = 0


class Discriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, h], one for each overlapping patch; high = real."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, len(widths)):
            stride = 2 if i < config.layers else 1
            # Group norm: unlike batch norm it is the same on one process as on many
            parts += [nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False), nn.GroupNorm(8, widths[i])]
            parts.append(nn.LeakyReLU(0.2))
        parts.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss for logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last layer, within 0.3 to 10 (Esser et al., 2021).

    The gradients are those of the joined batch of all processes, so that these have one ratio, that of one process.
    """
    losses = reconstruction, adversarial
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().flatten() for loss in losses]
    wanted, found = all_reduce_mean(torch.stack(gradients)).norm(dim=1)
    return (wanted / (found + 1e-6)).clamp(0.3, 10.0).detach()
