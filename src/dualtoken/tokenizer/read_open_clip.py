"""Pretrained towers in the format of open_clip: an architecture's config, and one file of weights.

The image tower is a timm model in any case: open_clip's trunk, or timm's likeness of open_clip's own transformer. The
names of the weights are turned into timm's by timm itself.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from torch import Tensor

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import load_torch_file
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.encoder import ImageTextConfig
from dualtoken.tokenizer.text_tower import import_open_clip
from dualtoken.tokenizer.weights import (
    CLIP_VIT,
    OPENAI_MEAN,
    OPENAI_STD,
    Pretrained,
    colors,
    first_line,
    logits,
    mismatch,
)

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def read_open_clip(path: Path, who: str) -> Pretrained:
    """A directory as open_clip's `save_for_hf` writes it."""
    written = json.loads((path / CONFIG).read_text())
    statistics = _statistics(written.get("preprocess_cfg", {}))
    weights = next(path / name for name in WEIGHTS if (path / name).is_file())
    return _read(written["model_cfg"], statistics, weights, who)


def read_named(source: str, option: str, presets: str) -> Pretrained:
    """NAME=FILE. Raises UserError for a name alone or a file that is not there, saying where one is published."""
    name, _, file = source.partition("=")
    if not file and "/" in name:
        raise UserError(f"{option} {source}: no such directory (a Hugging Face id is written hf-hub:ORG/NAME)")
    try:
        open_clip = import_open_clip(f"{option} {source}: an open_clip architecture")
    except UserError as error:
        known = f"no such directory, and no preset (presets: {presets})"
        raise UserError(str(error) if file else f"{option} {source}: {known}; {error}") from None
    if name not in open_clip.list_models():
        near = [n for n in open_clip.list_models() if n.lower().startswith(name.lower()[:5])][:4]
        raise UserError(
            f"{option} {source}: no such directory, no preset (presets: {presets}), and no architecture "
            f"of open_clip{' (near: ' + ', '.join(near) + ')' if near else ''}"
        )
    if not Path(file).is_file():  # "" neither
        missing = f"no such file {file}" if file else "an architecture without weights"
        raise UserError(f"{option} {source}: {missing}; {_published(open_clip, name)}, then {option} {name}=FILE")
    who = f"{option} {source}"
    model = open_clip.get_model_config(name)
    statistics = _published_statistics(open_clip, name, Path(file).parent / CONFIG, who)
    return _read(model, statistics, Path(file), who)


def _statistics(preprocess: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Color statistics of a preprocess_cfg, or of an entry in open_clip's table; open_clip's default is OpenAI's."""
    return colors(preprocess.get("mean", OPENAI_MEAN), preprocess.get("std", OPENAI_STD))


def _published_statistics(open_clip: Any, name: str, beside: Path, who: str) -> dict[str, tuple[float, ...]]:
    """Color statistics of a name's weights: of the config that lies beside them, else of open_clip's table.

    Raises UserError where the table has several, as for ViT-L-14.
    """
    if beside.is_file():
        return _statistics(json.loads(beside.read_text()).get("preprocess_cfg", {}))
    known = [_statistics(written) for written in _table(open_clip, name).values()] or [_statistics({})]
    if any(statistics != known[0] for statistics in known):
        raise UserError(
            f"{who}: {name} has been published with several color statistics (mean and std); put the {CONFIG} that was "
            "published with the file beside it"
        )
    return known[0]


def _table(open_clip: Any, name: str) -> dict[str, dict[str, Any]]:
    """open_clip's published weights of an architecture by tag, without those made with the other GELU."""
    quick = bool(open_clip.get_model_config(name).get("quick_gelu"))
    entries = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    return {tag: written for tag, written in entries.items() if bool(written.get("quick_gelu")) == quick}


def _published(open_clip: Any, name: str) -> str:
    """Which file to download, and from where, as far as open_clip's table of pretrained weights tells."""
    places: dict[str, list[str]] = {}
    for tag, written in _table(open_clip, name).items():
        repository, _, file = written.get("hf_hub", "").rpartition("/")
        if repository:
            places.setdefault(file or " or ".join(WEIGHTS), []).append(f"https://huggingface.co/{repository} ({tag})")
    if not places:
        return "open_clip knows of no published weights for it"
    other = f"{name}-quickgelu"
    hint = f" (weights made with QuickGELU: {other})" if open_clip.list_pretrained_tags_by_model(other) else ""
    return "download " + "; or ".join(f"{file} of {', '.join(of)}" for file, of in places.items()) + hint


def _read(model: dict[str, Any], statistics: dict[str, tuple], weights: Path, who: str) -> Pretrained:
    """An open_clip model by its config and its file of weights; what it cannot be is found before the file is read."""
    backbone, tower = _backbone(model, statistics, who), _text_tower(model, who)
    return _assemble(backbone, tower, _read_weights(weights, who), weights.parent, who)


def _assemble(
    backbone: BackboneConfig, tower: dict[str, Any], state: dict[str, Tensor], files: Path, who: str
) -> Pretrained:
    """Both towers from open_clip's state."""
    image = _image_tower(state, backbone, who)
    state = {k: v for k, v in state.items() if not k.startswith("visual.")}
    if "text_projection" in state:  # the older layout has the text tower's parts at the top
        state = import_open_clip(who).model.convert_to_custom_text_state_dict(state)
    scale = logits(state.pop("logit_scale"), state.pop("logit_bias", None))
    text = {k: v.float() for k, v in state.items()}
    return Pretrained(ImageTextConfig(asdict(backbone), tower), image | text | scale, files)


def _text_tower(model: dict[str, Any], who: str) -> dict[str, Any]:
    """The dict of the text tower. Raises UserError for one that is not of open_clip's own."""
    text = model["text_cfg"]
    if text.get("hf_model_name") or "multimodal_cfg" in model:
        raise UserError(f"{who}: its text tower is not one of open_clip's own; give a CLIP or SigLIP model")
    sizes = vars(import_open_clip(who).CLIPTextCfg(**text))
    tower = {key: sizes[key] for key in ("width", "layers", "heads", "vocab_size")}
    own = {"embed_dim": model["embed_dim"], "quick_gelu": bool(model.get("quick_gelu")), "text_cfg": text}
    return tower | {"kind": "open_clip", "length": sizes["context_length"], "config": own}


# What a vision_cfg of open_clip's own transformer may set; anything else changes the model in a way timm's has not.
NATIVE = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "act_kwargs"}


def _backbone(model: dict[str, Any], statistics: dict[str, tuple], who: str) -> BackboneConfig:
    """The timm model of an open_clip config: its trunk, or timm's likeness of open_clip's own transformer."""
    wanted = import_open_clip(who).CLIPVisionCfg(**model["vision_cfg"])
    if wanted.timm_model_name:
        pool, projection = wanted.timm_pool, wanted.timm_proj
        if projection == "mlp" or "attn" in (pool or "") or (projection == "linear" and pool):
            raise UserError(f"{who}: timm_pool {pool!r} with timm_proj {projection!r} is not supported")
        overrides = {"global_pool": pool} if pool else {}
        width = 0 if projection == "none" else model["embed_dim"]
        return BackboneConfig(wanted.timm_model_name, overrides, projection=width, **statistics)
    plain = import_open_clip(who).CLIPVisionCfg()
    strange = {
        f.name for f in fields(wanted) if getattr(wanted, f.name) != getattr(plain, f.name) and f.name not in NATIVE
    }
    tanh = {"approximate": "tanh"}
    if strange or not isinstance(wanted.layers, int) or wanted.act_kwargs not in (None, tanh):
        what = sorted(strange) or [f"layers {wanted.layers}, act_kwargs {wanted.act_kwargs}"]
        raise UserError(f"{who}: an image tower with {', '.join(what)} has no likeness in timm")
    gelu = "gelu_tanh" if wanted.act_kwargs else "gelu"
    overrides = {
        "embed_dim": wanted.width,
        "depth": wanted.layers,
        "num_heads": wanted.width // wanted.head_width,
        "mlp_ratio": wanted.mlp_ratio,
        "img_size": wanted.image_size,
        "patch_size": wanted.patch_size,
        "act_layer": "quick_gelu" if model.get("quick_gelu") else gelu,
    }
    return BackboneConfig(CLIP_VIT, overrides, projection=model["embed_dim"], **statistics)


def _image_tower(state: dict[str, Tensor], backbone: BackboneConfig, who: str) -> dict[str, Tensor]:
    """The image tower of an open_clip file under our names, by timm's own filters."""
    trunk = any(key.startswith("visual.trunk.") for key in state)
    if trunk == (backbone.name == CLIP_VIT):
        kinds = "open_clip's own transformer", "a trunk of timm"
        raise UserError(f"{who}: the image tower is {kinds[trunk]} in the file, {kinds[not trunk]} in the architecture")
    with torch.device("meta"):
        vit = Backbone(backbone).vit
    places = vit.state_dict()
    theirs = {
        f"visual.{'trunk.patch_embed.proj' if trunk else 'conv1'}.weight": "patch_embed.proj.weight",
        f"visual.{'trunk.pos_embed' if trunk else 'positional_embedding'}": "pos_embed",
    }
    for key, place in theirs.items():  # timm would resample these without a word
        if key in state and place not in places:
            raise UserError(f"{who}: its weights hold {key}, for which the model has no place")
        if key in state and places[place].shape not in (state[key].shape, (1, *state[key].shape)):
            raise UserError(mismatch(who, key, state[key].shape, places[place].shape))
    rename = eva.checkpoint_filter_fn if isinstance(vit, eva.Eva) else vision_transformer.checkpoint_filter_fn
    image = rename(dict(state), vit)
    if "visual.head.proj.bias" in state:
        image["head.bias"] = state["visual.head.proj.bias"]
    return {f"backbone.vit.{k}": v.float() for k, v in image.items()}


def _read_weights(path: Path, who: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .bin or .pt file; nothing is unpickled."""
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{who}: {path.name} cannot be read ({first_line(error)})") from None
    else:
        option = who.partition(" ")[0]
        state = load_torch_file(path, option, "weights of open_clip (a TorchScript file is not: take the safetensors)")
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if "logit_scale" not in state or not any(k.startswith("visual.") for k in state):
        raise UserError(f"{who}: {path.name} holds no open_clip model (no visual., no logit_scale in it)")
    for number in ("input_resolution", "context_length", "vocab_size"):  # in files made from OpenAI's
        state.pop(number, None)
    return state
