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

    def build(self) -> ImageTextEncoder:
        """The encoder, in evaluation mode."""
        encoder = ImageTextEncoder(self.config)
        encoder.load_state_dict(self.state)
        return encoder.eval()

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
    wrong = first_misfit(found.state, needed)
    if wrong is not None:
        raise UserError(f"{who}: {wrong}")


def first_misfit(stored: dict[str, Tensor], needed: dict[str, Tensor]) -> str | None:
    """What is wrong with the first weight that is missing, of another shape, or without a place; None if all fit."""
    for key, value in needed.items():
        if key not in stored:
            return f"its weights have no {key}"
        if stored[key].shape != value.shape:
            return f"does not fit: {key} is {list(stored[key].shape)} in the file, {list(value.shape)} in the model"
    extra = sorted(stored.keys() - needed.keys())
    return f"its weights hold {extra[0]}, for which the model has no place" if extra else None


def mismatch(who: str, key: str, stored: Iterable[int], needed: Iterable[int]) -> str:
    """The error for a weight of another shape."""
    return f"{who}: does not fit: {key} is {list(stored)} in the file, {list(needed)} in the model"


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
