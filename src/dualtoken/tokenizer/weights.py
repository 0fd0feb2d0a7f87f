"""What was read of pretrained weights, whatever their format: the state of an `ImageTextEncoder`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder

# timm's models of the two plain shapes; every size is an override.
SIGLIP_VIT, CLIP_VIT = "vit_base_patch16_siglip_256", "vit_base_patch16_clip_224"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass
class Pretrained:
    """What was found: an encoder's config and state, and where the files of its text tokenizer are.

    `files` is None where they are not known. Without keys of "text." in `state` the source holds an image tower alone.
    """

    config: ImageTextConfig
    state: dict[str, Tensor]
    files: Path | None

    @property
    def backbone(self) -> dict[str, Tensor]:
        """The state of the `Backbone`."""
        return {k.removeprefix("backbone."): v for k, v in self.state.items() if k.startswith("backbone.")}

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return any(key.startswith("text.") for key in self.state)


def colors(mean: Iterable[float], std: Iterable[float]) -> dict[str, tuple[float, ...]]:
    """Fields of `BackboneConfig`; none of them where the weights want values in [-1, 1], as ours are."""
    mean, std = tuple(mean), tuple(std)
    return {} if mean == std == HALF else {"mean": mean, "std": std}


def logits(scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Scale and bias of the match logits; CLIP has no bias."""
    bias = torch.zeros(()) if bias is None else bias
    return {"logit_scale": scale.detach().float().reshape(()), "logit_bias": bias.detach().float().reshape(())}


def check(found: Pretrained, who: str) -> None:
    """Raise UserError at the first weight that is missing, of another shape, or without a place."""
    with torch.device("meta"):
        needed = ImageTextEncoder(found.config).state_dict()
    if not found.has_text:
        needed = {k: v for k, v in needed.items() if k.startswith("backbone.")}
    for key, value in needed.items():
        if key not in found.state:
            raise UserError(f"{who}: its weights have no {key}")
        if found.state[key].shape != value.shape:
            raise UserError(mismatch(who, key, found.state[key].shape, value.shape))
    for key in sorted(found.state.keys() - needed.keys()):
        raise UserError(f"{who}: its weights hold {key}, for which the model has no place")


def mismatch(who: str, key: str, stored: Iterable[int], needed: Iterable[int]) -> str:
    """The error for a weight of another shape."""
    return f"{who}: does not fit: {key} is {list(stored)} in the file, {list(needed)} in the model"


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
