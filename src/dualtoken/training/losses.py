"""The losses of the tokenizer (paper eq. 1 to 4), every weight in config, every part returned apart.

Shapes: B batch, N positions, C width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.tokenizer.tokenizer import TokenizerOutput
from dualtoken.training.discriminator import Discriminator, adaptive_weight, hinge_loss


@dataclass
class LossConfig:
    """Weights of the parts; 0 leaves a part out.

    Args:
        mse, perceptual, adversarial: of the reconstruction loss, eq. 3. The adversarial weight is multiplied by
            the ratio of gradient norms.
        features, pooled: of the semantic loss, eq. 4, on the semantic layer and on the pooled feature.
        commitment, codebook: of eq. 1 (the second counts for gradient-trained codebooks only).
        lpips_net, lpips_weights: torchvision's weights of "vgg" or "alex"; without a file the perceptual loss is
            on the frozen teacher's shallow features.
    """

    mse: float = 5.0
    perceptual: float = 1.0
    adversarial: float = 0.75
    features: float = 5.0
    pooled: float = 1.0
    commitment: float = 5.0
    codebook: float = 1.0
    lpips_net: str = "vgg"
    lpips_weights: str | None = None


@dataclass
class Losses:
    """The total of eq. 2 and its parts before weighting, all scalars."""

    total: Tensor
    parts: dict[str, Tensor]


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Eq. 4: mean squared error minus cosine over the last dimension; -1 for equal vectors."""
    return F.mse_loss(found, wanted) - F.cosine_similarity(found, wanted, dim=-1).mean()


def semantic_parts(output: TokenizerOutput, teacher_features: Tensor, teacher_pooled: Tensor) -> dict[str, Tensor]:
    """Eq. 4 against the teacher's semantic layer [B, N, C] and pooled feature [B, C]."""
    return {
        "features": distance(output.semantic.features, teacher_features),
        "pooled": distance(output.pooled, teacher_pooled),
    }


def generator_losses(
    output: TokenizerOutput,
    images: Tensor,
    teacher_features: Tensor,
    teacher_pooled: Tensor,
    config: LossConfig,
    perceptual: nn.Module | None,
    discriminator: nn.Module | None,
    last_layer: nn.Parameter,
) -> Losses:
    """Eq. 2 for one batch of images [B, 3, H, W].

    `perceptual` and `discriminator` may be None, then their parts are left out.
    """
    found = output.images.float()
    parts = {"mse": F.mse_loss(found, images)}
    total = config.mse * parts["mse"]
    if perceptual is not None:
        parts[perceptual.name] = perceptual(found, images)
        total = total + config.perceptual * parts[perceptual.name]
    if discriminator is not None:
        parts["adversarial"] = -discriminator(found).mean()
        ratio = adaptive_weight(total, parts["adversarial"], last_layer)
        total = total + config.adversarial * ratio * parts["adversarial"]
    parts |= semantic_parts(output, teacher_features, teacher_pooled)
    total = total + config.features * parts["features"] + config.pooled * parts["pooled"]
    for name in ("pixel", "semantic"):
        branch = getattr(output, name)
        parts[f"{name}_commitment"] = branch.commitment
        total = total + config.commitment * branch.commitment + config.codebook * branch.codebook_loss
    return Losses(total, parts)


def discriminator_loss(discriminator: Discriminator | nn.Module, images: Tensor, found: Tensor) -> Tensor:
    """Hinge loss of the discriminator on real and reconstructed images, both [B, 3, H, W]."""
    both = discriminator(torch.cat([images, found.detach().float()]))  # one pass: wrappers allow no two
    real, fake = both.chunk(2)
    return hinge_loss(real, fake)
