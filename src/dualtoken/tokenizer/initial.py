"""Where a tokenizer's backbone starts: from a pretrained encoder, or at random."""

from dataclasses import replace

import torch
from torch import Tensor

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.presets import fitting_shape
from dualtoken.tokenizer.pretrained import read_pretrained
from dualtoken.tokenizer.weights import first_misfit


def open_backbone(encoder: str, option: str = "--encoder") -> Backbone:
    """The image tower of an encoder (`tokenizer/pretrained.py`), in evaluation mode, on the GPU where there is one."""
    shape, state = load_backbone(encoder, BackboneConfig(""), option)
    backbone = Backbone(shape)
    backbone.load_state_dict(state)
    return backbone.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_backbone(
    encoder: str | None, config: BackboneConfig, option: str = "--encoder"
) -> tuple[BackboneConfig, dict[str, Tensor] | None]:
    """Shape and weights of a backbone; `encoder` as in `tokenizer/pretrained.py`.

    An encoder brings its own shape; from `config` come the layers to tap, and where it has a name the sizes that the
    weights must fit. Without an encoder: `config` and None. Raises UserError, naming `option`, for other models.
    """
    if encoder is None:
        return replace(config, name=config.name or BackboneConfig.name), None
    found = read_pretrained(encoder, option)
    shape = BackboneConfig(**found.config.backbone)
    if config.name:
        _check_fit(found.backbone, shape, config, encoder)
    layers = {k: getattr(config, k) or getattr(shape, k) for k in ("pixel_layer", "semantic_layer")}
    return replace(shape, **layers), found.backbone


def _check_fit(weights: dict[str, Tensor], shape: BackboneConfig, wanted: BackboneConfig, encoder: str) -> None:
    """Raise UserError at the first weight that does not fit the backbone asked for, with the shape that would."""
    with torch.device("meta"):
        needed = Backbone(replace(wanted, projection=shape.projection)).state_dict()
        own = Backbone(shape)
    wrong = first_misfit(weights, needed)
    if wrong is not None:
        fits = fitting_shape(own.width, own.layers, own.grid**2, own.prefix)
        hint = f"; --config {fits} would fit" if fits else ""
        raise UserError(f"--encoder {encoder}: {wrong} (--backbone.name {wanted.name}){hint}")
