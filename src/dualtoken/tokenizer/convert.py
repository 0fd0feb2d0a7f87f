"""`dualtoken convert`: a tokenizer checkpoint of the paper's repository -> directories of ours.

Such a checkpoint is a `.pt` with a `state_dict` and a JSON that describes it. Every key of it is used, or is known
and named here as dropped; anything else is an error.

Shapes: D depth, C width of the backbone, K codebook size.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import load_torch_file
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.decoder import DecoderConfig
from dualtoken.tokenizer.encoder import TOKENIZER_FILES
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.tokenizer.presets import fitting_shape
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.tokenizer.read_transformers import from_transformers
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer
from dualtoken.tokenizer.weights import Pretrained, first_misfit

WHAT = "a tokenizer checkpoint of the paper's repository"
# Optimiser and bookkeeping of its training, and a buffer of zeros in each projection.
DROPPED = ("epoch", "name", "optimizer", "scaler", "lr_scheduler")
BRANCHES = {"pixel": ("vq_pix", "pix"), "semantic": ("vq_sem", "sem")}
PROJECTION = {
    "norm1": "norm_attention",
    "norm3": "norm_projection",
    "norm2": "norm_mlp",
    "attn.qkv": "qkv",
    "attn.q_bias": "q_bias",
    "attn.v_bias": "v_bias",
    "attn.proj": "out",
    "proj": "projection",
    "mlp.norm": "mlp.norm",
    "mlp.w0": "mlp.gate",
    "mlp.w1": "mlp.up",
    "mlp.w2": "mlp.down",
}
DECODER = {
    "mid.block_1": "middle.0",
    "mid.attn_1": "middle.1",
    "mid.block_2": "middle.2",
    ".block.": ".blocks.",
    ".attn.": ".attention.",
    "upsample.conv": "upsample",
    "nin_shortcut": "skip",
    "proj_out": "out",
}
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}  # of the published models, whose weights do not tell
TOWER = "siglip_model."
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "merges.txt")  # beside TOKENIZER_FILES


def convert(
    checkpoint: str, description: str | None = None, siglip: str | None = None, output: str = "converted"
) -> None:
    """Convert a tokenizer checkpoint of the paper's repository (`.pt`) into OUTPUT/tokenizer and OUTPUT/encoder.

    Args:
        checkpoint: the `.pt`; read without unpickling anything but tensors.
        description: its JSON; default: config.json beside it.
        siglip: directory of the SigLIP model it started from, with its config.json, and its text tokenizer where texts
            are wanted; default: what the JSON names, where that is a directory beside it.
        output: folder to write.
    """
    described = Path(description) if description else Path(checkpoint).parent / "config.json"
    loaded, settings = load_torch_file(checkpoint, "CHECKPOINT", WHAT), read_settings(described)
    source = Path(siglip) if siglip else described.parent / settings.get("pretrained_model", "")
    if not (source / "config.json").is_file() or source == described.parent:
        if siglip:
            raise UserError(f"--siglip {siglip}: no config.json in it; give the directory of the SigLIP model")
        source = None
    state = read_state(loaded, checkpoint)
    tower = convert_towers(state, source)
    tokenizer = convert_tokenizer(state, settings, tower)
    folder = Path(output)
    tokenizer.save_pretrained(folder / "tokenizer")
    DualTokenImageProcessor(size=tokenizer.image_size).save_pretrained(folder / "tokenizer")
    print(f"written: {folder / 'tokenizer'}")
    tower.build().save_pretrained(folder / "encoder")
    for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS):
        if source is not None and (source / name).is_file():
            shutil.copy(source / name, folder / "encoder" / name)
    print(f"written: {folder / 'encoder'}")


def read_settings(path: Path) -> dict[str, Any]:
    """The description in the checkpoint's JSON. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"--description {path}: no such file; it is the JSON that belongs to the checkpoint")
    try:
        written = json.loads(path.read_text())
        return written.get("rqvaesiglip", written) | {"model": written["model_type"]}
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
        raise UserError(f"--description {path}: not the JSON of {WHAT}") from None


def read_state(loaded: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a loaded `.pt`, without the prefixes of training. Raises UserError for another content."""
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        raise UserError(f"CHECKPOINT {path}: no state_dict in it, so it is not {WHAT}")
    unknown = sorted(set(loaded) - {"state_dict", *DROPPED})
    if unknown:
        raise UserError(f"CHECKPOINT {path}: holds {', '.join(unknown)}, unknown in {WHAT}")
    state = loaded["state_dict"]
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"CHECKPOINT {path}: its state_dict holds something other than tensors")
    return {re.sub(r"^(module\.)?(rqvaesiglip\.)?", "", key): value for key, value in state.items()}


def convert_towers(state: dict[str, Tensor], siglip: Path | None) -> Pretrained:
    """The image and text towers as an encoder of ours; sizes from the SigLIP model's directory, if there is one.

    Raises UserError for a key that is missing, unknown or of another shape.
    """
    config = SiglipConfig.from_pretrained(siglip) if siglip is not None else published_siglip(state)
    with torch.device("meta"):
        model = SiglipModel(config)
    stored = {k.removeprefix(TOWER): v for k, v in state.items() if k.startswith(TOWER)}
    stored = {k: v for k, v in stored.items() if not k.endswith("position_ids")}
    wrong = first_misfit(stored, model.state_dict())
    if wrong is not None:
        raise UserError(f"the checkpoint's {TOWER.rstrip('.')}: {wrong}{_hint(state)}")
    model.load_state_dict(stored, assign=True)
    return from_transformers(model.float(), siglip, f"CHECKPOINT {TOWER}")


def published_siglip(state: dict[str, Tensor]) -> SiglipConfig:
    """The sizes of a published SigLIP model, read from its weights."""
    sizes = {}
    for name, place in (("vision", "patch_embedding.weight"), ("text", "token_embedding.weight")):
        part = f"{TOWER}{name}_model."
        embedding = _tensor(state, f"{part}embeddings.{place}")
        width, positions = embedding.shape[-1], len(_tensor(state, f"{part}embeddings.position_embedding.weight"))
        if name == "vision":
            width, patch = embedding.shape[0], embedding.shape[-1]
            own = {"patch_size": patch, "image_size": patch * round(positions**0.5)}
        else:
            own = {"vocab_size": len(embedding), "max_position_embeddings": positions, "projection_size": width}
        if width not in SIGLIP_HEADS:
            raise UserError(
                f"a {name} tower of width {width} is not of a published SigLIP model: give the directory of the model "
                "it started from as --siglip"
            )
        sizes[f"{name}_config"] = own | {
            "hidden_size": width,
            "num_attention_heads": SIGLIP_HEADS[width],
            "num_hidden_layers": _layers(state, part),
            "intermediate_size": len(_tensor(state, f"{part}encoder.layers.0.mlp.fc1.bias")),
        }
    return SiglipConfig(**sizes)


def convert_tokenizer(
    state: dict[str, Tensor], settings: dict[str, Any], tower: Pretrained
) -> DualTokenVisionTokenizer:
    """The tokenizer of such a state, whose image tower is `tower`'s.

    Raises UserError for keys that are missing, unknown or of another shape than the settings say.
    """
    try:
        tokenizer = DualTokenVisionTokenizer(tokenizer_config(state, settings, tower))
    except KeyError as error:
        raise UserError(f"the checkpoint's JSON has no {error.args[0]!r}, as that of {WHAT} has") from None
    for name, (_, short) in BRANCHES.items():
        books = len([key for key in state if re.fullmatch(rf"quantizer_{short}\.codebooks\.\d+\.weight", key)])
        depth = getattr(tokenizer, name).quantizer.config.depth
        if books != depth:
            raise UserError(f"the checkpoint has {books} codebooks in quantizer_{short}, its JSON describes {depth}")
    ours = {f"backbone.{name}": (f"{TOWER}vision_model", value) for name, value in tower.backbone.items()}
    ours |= dict(our_state(state, len(settings["ddconfig"]["ch_mult"])))
    wanted = tokenizer.state_dict()
    for name, (key, value) in ours.items():
        if name not in wanted:
            raise UserError(f"the checkpoint's {key} has no place in the model that its JSON describes")
        if value.shape != wanted[name].shape:
            shapes = f"{list(value.shape)}, its JSON describes {list(wanted[name].shape)}"
            raise UserError(f"the checkpoint's {key} is {shapes}{_hint(state)}")
    missing = sorted(set(wanted) - set(ours) - {n for n in wanted if n.endswith("codebook.updates")})
    if missing:
        raise UserError(f"the checkpoint has nothing for {', '.join(missing[:3])}, which its JSON describes")
    tokenizer.load_state_dict({name: value for name, (_, value) in ours.items()}, strict=False)
    return tokenizer.eval()


def tokenizer_config(state: dict[str, Tensor], settings: dict[str, Any], tower: Pretrained) -> DualTokenVisionConfig:
    """Our config of a checkpoint, from its JSON; sizes of the backbone are the tower's."""
    backbone = tower.config.backbone | {"pixel_layer": settings["layer_recon"], "semantic_layer": settings["layer_sem"]}
    grid = backbone["overrides"]["img_size"] // backbone["overrides"]["patch_size"]
    drawn = settings["ddconfig"]
    latent, multipliers = settings["decoder_latent_shape"][0], tuple(drawn["ch_mult"])
    coarse_to_fine = [drawn["resolution"] // 2**level for level in reversed(range(len(multipliers)))]
    attended = [side in drawn["attn_resolutions"] for side in coarse_to_fine]
    if sorted(attended, reverse=True) != attended:
        raise UserError(
            f"attn_resolutions {drawn['attn_resolutions']}: attention at a finer level than one without it is unknown"
        )
    decoder = DecoderConfig(
        channels=drawn["ch"], multipliers=multipliers, blocks=drawn["num_res_blocks"] + 1,
        z_channels=drawn["decoder_in_channels"], attention=sum(attended),
        latent_size=None if latent == grid else latent,
    )  # fmt: skip
    branches = {name: asdict(branch_config(settings[key])) for name, (key, _) in BRANCHES.items()}
    if any(key.startswith("prequant_shortcut.") for key in state):
        branches["pixel"] |= {
            "shortcut_scale": settings["weight_shortcut"],
            "shortcut_layer": settings["layer_shortcut"],
        }
    return DualTokenVisionConfig(backbone, branches["pixel"], branches["semantic"], asdict(decoder))


def branch_config(settings: dict[str, Any]) -> BranchConfig:
    """Our config of one of its quantisers. Raises UserError for kinds that are not RVQ over one shared codebook."""
    if settings["bottleneck_type"] not in ("rq", "rq_ema") or not settings["shared_codebook"]:
        raise UserError(
            f"quantiser {settings['bottleneck_type']!r} with shared_codebook={settings['shared_codebook']}: only "
            "'rq' and 'rq_ema' over one shared codebook are known"
        )
    return BranchConfig(
        QuantizerConfig(
            codebook_size=settings["n_embed"],
            code_dim=settings["embed_dim"],
            depth=settings["code_shape"][-1],
            decay=settings["decay"],
            restart_below=QuantizerConfig.restart_below if settings["restart_unused_codes"] else 0.0,
        )
    )


def our_state(state: dict[str, Tensor], levels: int) -> Iterator[tuple[str, tuple[str, Tensor]]]:
    """Our name -> its key and value, for everything but the towers. Raises UserError for an unknown key."""
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "siglip_model":
            continue
        if part in ("post_quant_conv", "decoder"):
            yield f"decoder.{decoder_name(key, levels)}", (key, value)
        elif part.startswith(("prequant_", "postquant_")):
            name = projection_name(rest)
            if name is not None:
                yield f"{_branch_part(part, key)}.{name}", (key, value)
            elif value.any():
                raise UserError(f"the checkpoint's {key} is not zero: this projection has a bias on its keys")
        elif part.startswith("quantizer_"):
            found = _codebook(state, part, rest, value)
            if found is not None:
                yield f"{_branch_part(part, key)}.codebook.{found[0]}", (key, found[1])
        else:
            raise UserError(f"the checkpoint's {key} is unknown in {WHAT}")


def projection_name(name: str) -> str | None:
    """A projection's parameter in our words; None for its buffer of zeros. Raises UserError for an unknown one."""
    if name == "attn.zero_k_bias":
        return None
    if name in PROJECTION:
        return PROJECTION[name]
    module, _, kind = name.rpartition(".")
    if module not in PROJECTION:
        raise UserError(f"{name}: unknown in a projection of {WHAT}")
    return f"{PROJECTION[module]}.{kind}"


def decoder_name(name: str, levels: int) -> str:
    """A decoder's parameter in our words; its levels count from full resolution, ours from the coarsest."""
    name = name.replace("post_quant_conv.", "entry.").removeprefix("decoder.")
    name = re.sub(r"^up\.(\d+)", lambda m: f"levels.{levels - 1 - int(m[1])}", name)
    for theirs, ours in DECODER.items():
        name = name.replace(theirs, ours)
    return name


def _branch_part(part: str, key: str) -> str:
    """A module's name in our words: prequant_pix -> pixel.pre, and so on."""
    kind, _, of = part.partition("_")
    if part == "prequant_shortcut":
        return "pixel.shortcut"
    names = {short: name for name, (_, short) in BRANCHES.items()}
    if of not in names:
        raise UserError(f"the checkpoint's {key} is unknown in {WHAT}")
    return f"{names[of]}.{ {'prequant': 'pre', 'postquant': 'post', 'quantizer': 'quantizer'}[kind] }"


def _codebook(state: dict[str, Tensor], part: str, rest: str, value: Tensor) -> tuple[str, Tensor] | None:
    """A codebook's tensor in our words: the file repeats the shared one for every depth, so only the first counts."""
    match = re.fullmatch(r"codebooks\.(\d+)\.(weight|cluster_size_ema|embed_ema)", rest)
    if match is None:
        raise UserError(f"the checkpoint's {part}.{rest} is unknown in {WHAT}")
    first = _tensor(state, f"{part}.codebooks.0.{match[2]}")
    if match[1] != "0":
        if not torch.equal(first, value):
            raise UserError(f"the checkpoint's {part} has different codebooks at different depths: not a shared one")
        return None
    if match[2] == "weight":
        if value[-1].any():
            raise UserError(f"the checkpoint's {part}.{rest} does not end in a row of zeros, its padding")
        return "weight", value[:-1]
    return {"cluster_size_ema": "cluster_size", "embed_ema": "embed_sum"}[match[2]], value


def _layers(state: dict[str, Tensor], tower: str) -> int:
    return len([k for k in state if k.startswith(f"{tower}encoder.layers.") and k.endswith("layer_norm1.bias")])


def _tensor(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserError(f"the checkpoint has no {key}: not {WHAT}")
    return state[key]


def _hint(state: dict[str, Tensor]) -> str:
    """Which shape by name has a tower of these sizes."""
    tower = f"{TOWER}vision_model."
    width = len(_tensor(state, f"{tower}embeddings.patch_embedding.weight"))
    positions = len(_tensor(state, f"{tower}embeddings.position_embedding.weight"))
    found = fitting_shape(width, _layers(state, tower), positions)
    return f"; its weights would fit {found}" if found else ""
