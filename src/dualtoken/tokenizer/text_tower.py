"""The text tower of an image-text encoder: ours, transformers' SigLIP or CLIP, or open_clip's.

A tower is built from a dict of its sizes (the fields of `TextConfig`). That of a pretrained one also holds `kind` and
the `config` of its library, so that a saved encoder needs nothing but its directory.

Shapes: B batch, T text length, C width.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, SiglipTextConfig, SiglipTextModel

from dualtoken.core.errors import UserError


@dataclass
class TextConfig:
    """The text tower: `length` tokens a caption (longer ones are cut), `vocab_size` at most."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 32
    vocab_size: int = 512


def build_text_tower(config: dict[str, Any], width: int) -> nn.Module:
    """A tower from its dict, ending in the joint space of `width`."""
    return TOWERS[config.get("kind", "dualtoken")](config, width)


def embed_ids(tower: nn.Module, ids: Tensor) -> Tensor:
    """Token numbers [B, T] through any of the towers -> [B, C], not normalised."""
    out = tower(ids)
    if isinstance(out, Tensor):  # open_clip
        return out
    return out.text_embeds if "text_embeds" in out else out.pooler_output


def _own(config: dict[str, Any], width: int) -> SiglipTextModel:
    text = TextConfig(**config)
    return SiglipTextModel(
        SiglipTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            max_position_embeddings=text.length,
            projection_size=width,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _open_clip(config: dict[str, Any]) -> nn.Module:
    """open_clip's text transformer, of a model's `embed_dim`, `quick_gelu` and `text_cfg`."""
    model = import_open_clip("a text tower of open_clip").model
    # The one place in open_clip that turns a text_cfg into a tower without an image tower beside it
    return model._build_text_tower(config["embed_dim"], dict(config["text_cfg"]), config["quick_gelu"])


TOWERS = {
    "dualtoken": _own,
    "siglip": lambda config, _: SiglipTextModel(SiglipTextConfig.from_dict(config["config"])),
    "clip": lambda config, _: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config["config"])),
    "open_clip": lambda config, _: _open_clip(config["config"]),
}


def import_open_clip(what: str) -> ModuleType:
    """The module open_clip, an optional extra. Raises UserError saying `what` needs it where it is not installed."""
    try:
        import open_clip
    except ImportError:
        raise UserError(f"{what} needs open_clip: pip install 'dualtoken[clip]'") from None
    return open_clip
