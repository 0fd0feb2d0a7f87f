"""The perceptual term of the reconstruction loss (paper eq. 3).

With weights given by path it is LPIPS (Zhang et al., 2018). Without, it compares shallow features of the frozen
teacher and is reported as `teacher_perceptual`, never as LPIPS: the two are not comparable numbers.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import _LPIPS

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import load_torch_file
from dualtoken.tokenizer.backbone import Backbone

FILES = {  # that torchvision publishes
    "vgg": "vgg16-397923af.pth (VGG16_Weights.IMAGENET1K_V1)",
    "alex": "alexnet-owt-7be5be79.pth (AlexNet_Weights.IMAGENET1K_V1)",
}


class TeacherPerceptual(nn.Module):
    """Distance of images in layers of a frozen backbone, channels normalised at each position as LPIPS does."""

    name = "teacher_perceptual"

    def __init__(self, backbone: Backbone, layers: tuple[int, ...] | None = None):
        super().__init__()
        self.backbone = backbone
        self.layers = layers or tuple(sorted({1, backbone.pixel_layer}))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two batches [B, 3, H, W] in [-1, 1] -> scalar, 0 for equal ones; no gradient to `targets`."""
        with torch.no_grad():
            wanted = self.backbone.taps(targets, self.layers)
        found = self.backbone.taps(images, self.layers)
        pairs = zip(found, wanted, strict=True)
        parts = [(F.normalize(f, dim=-1) - F.normalize(w, dim=-1)).square().sum(-1).mean() for f, w in pairs]
        return torch.stack(parts).mean()


class LPIPS(nn.Module):
    """Learned perceptual distance on frozen AlexNet or VGG features.

    Args:
        net: "vgg" or "alex".
        option: how the options are called in errors, before _net and _weights.
        weights: torchvision's file of the network, e.g. vgg16-397923af.pth. The linear layers of LPIPS come with
            torchmetrics. Raises UserError where the file is missing or of another network.
    """

    name = "lpips"

    def __init__(self, net: str, weights: str | Path, option: str = "--lpips"):
        super().__init__()
        if net not in FILES:
            raise UserError(f"{option}_net {net!r} must be 'vgg' or 'alex'")
        what = f"torchvision's {FILES[net]}"
        state = load_torch_file(weights, f"{option}_weights", what)
        model = _LPIPS(pretrained=True, net=net, pnet_rand=True)
        try:
            features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
            for name, place in model.net.named_parameters():  # "slice2.5.weight" is torchvision's "features.5.weight"
                place.data.copy_(features[name.split(".", 1)[1]])
        except (KeyError, RuntimeError, AttributeError) as error:
            raise UserError(f"{option}_weights {weights}: not {what} ({error})") from None
        self.model = model.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two batches [B, 3, H, W] in [-1, 1] -> scalar mean distance."""
        return self.model(images, targets).mean()


def build_perceptual(
    teacher: Backbone, net: str, weights: str | None, option: str = "--lpips"
) -> LPIPS | TeacherPerceptual:
    """LPIPS where weights are given, else the teacher's own features."""
    return LPIPS(net, weights, option) if weights else TeacherPerceptual(teacher)
