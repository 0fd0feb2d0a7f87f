"""Where a tokenizer's backbone starts: an encoder of ours, a SigLIP model of transformers, or at random."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig, map_siglip_keys
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder
from dualtoken.tokenizer.presets import BUNDLED, encoder_directory


def load_backbone(encoder: str | None, config: BackboneConfig) -> tuple[BackboneConfig, dict[str, Tensor] | None]:
    """Shape and weights of a backbone; `encoder` is a directory or a preset.

    An encoder of ours brings its own shape, of which only the layers to tap are taken from `config`; a SigLIP model
    must fit the shape of `config`, to which its activation is added. Without an encoder: `config` and None. Raises
    UserError for other models.
    """
    if encoder is None:
        return config, None
    path = encoder_directory(encoder) if encoder in BUNDLED else check_directory(encoder, "--encoder")
    written = json.loads((path / "config.json").read_text())
    kind = written.get("model_type")
    if kind == ImageTextConfig.model_type:
        model = ImageTextEncoder.from_pretrained(path)
        shape = BackboneConfig(**model.config.backbone)
        layers = {k: getattr(config, k) or getattr(shape, k) for k in ("pixel_layer", "semantic_layer")}
        return replace(shape, **layers), model.backbone.state_dict()
    if kind in ("siglip", "siglip_vision_model", "siglip2"):
        if written.get("vision_config", written).get("hidden_act", "gelu_pytorch_tanh") == "gelu_pytorch_tanh":
            config = replace(config, overrides={**config.overrides, "act_layer": "gelu_tanh"})
        return config, _siglip(path, config)
    raise UserError(f"--encoder {encoder}: holds a {kind!r} model; give an image-text encoder or a SigLIP model")


def _siglip(path: Path, config: BackboneConfig) -> dict[str, Tensor]:
    """The image tower of transformers' SigLIP weights, under the backbone's names, if its shape fits."""
    stored = load_file(path / "model.safetensors")
    vision = {k: v for k, v in stored.items() if k.startswith("vision_model.")} or stored  # or the tower alone
    backbone = Backbone(config)
    try:
        mapped = {f"vit.{k}": v.float() for k, v in map_siglip_keys(vision, backbone.layers).items()}
        backbone.load_state_dict(mapped)
    except (KeyError, RuntimeError) as error:
        line = f"no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[1].strip()
        raise UserError(f"--encoder {path}: does not fit --backbone.name {config.name} ({line})") from None
    return backbone.state_dict()
