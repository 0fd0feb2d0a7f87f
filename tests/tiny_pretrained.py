"""Tiny models of the families of the paper with random weights, written to disk by the libraries that publish them."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from timm.models import eva, register_model, vision_transformer, vitamin
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from dualtoken.tokenizer.encoder import train_text_tokenizer
from dualtoken.tokenizer.text_tower import TextConfig

SIZE, WIDTH, LENGTH = 32, 32, 16
TEXTS = ["a red star", "two blue rings on a white background", "a dog"]
SIZES = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}


@register_model
def tiny_siglip(pretrained=False, **options):
    return vision_transformer.vit_so400m_patch16_siglip_256(False, **SIZES | options)


@register_model
def tiny_eva02_clip(pretrained=False, **options):
    return eva.eva02_large_patch14_clip_224(False, **SIZES | options)


CONVOLUTIONS = vitamin.VitCfg(embed_dim=(8, 8, WIDTH), depths=(1, 1, 1), stem_width=8)
OF_VITAMIN = {"img_size": SIZE, "embed_dim": WIDTH, "depth": 3, "num_heads": 2, "embed_cfg": CONVOLUTIONS}


@register_model
def tiny_vitamin(pretrained=False, **options):
    return vitamin.vitamin_large_256(False, **OF_VITAMIN | options)


@register_model
def tiny_vitamin_without_positions(pretrained=False, **options):
    return vitamin.vitamin_xlarge_384(False, **OF_VITAMIN | options)


BPE = {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
NATIVE = {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
PIECES = {
    "context_length": LENGTH,
    "vocab_size": 128,
    "hf_tokenizer_name": "nobody/tiny-siglip",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 32,
    "heads": 2,
    "layers": 2,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}


def trunk(name, embed_dim, pool, projection, **more):
    vision = {"image_size": SIZE, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}
    return {"embed_dim": embed_dim, "custom_text": True, "vision_cfg": vision, "text_cfg": BPE} | more


CONFIGS = {  # of open_clip, with the options of the published ones
    "tiny-clip": {"embed_dim": 24, "vision_cfg": NATIVE, "text_cfg": BPE},
    "tiny-clip-quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": NATIVE, "text_cfg": BPE},
    "tiny-siglip": trunk("tiny_siglip", WIDTH, "map", "none", init_logit_bias=-10, text_cfg=PIECES),
    "tiny-eva": trunk("tiny_eva02_clip", 24, "token", None),
    "tiny-vitamin": trunk("tiny_vitamin", 24, "", "linear"),
    "tiny-vitamin-xl": trunk("tiny_vitamin_without_positions", 24, "", "linear"),
}
SIGLIP_COLORS = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


@lru_cache
def register():
    """Make CONFIGS known to open_clip by name."""
    folder = tempfile.TemporaryDirectory(prefix="dualtoken-tests-")
    _FOLDERS.append(folder)
    for name, config in CONFIGS.items():
        (Path(folder.name) / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(Path(folder.name))


_FOLDERS = []


def pieces(folder):
    """Write a small text tokenizer of transformers; 128 tokens at most."""
    train_text_tokenizer(TEXTS * 3, TextConfig(length=LENGTH, vocab_size=128)).save_pretrained(folder)
    return Path(folder)


def shaken(model, seed=0):
    """The model with noise on every weight, so that no bias is zero and no norm is plain."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def of_open_clip(name, folder, safe=True):
    """(model, preprocess) of open_clip, written to a folder; `safe` = .safetensors, else .bin."""
    register()
    folder.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    colors = SIGLIP_COLORS if name == "tiny-siglip" else {}
    model, _, preprocess = open_clip.create_model_and_transforms(name, **colors)
    text = CONFIGS[name]["text_cfg"]
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)  # open_clip's own has no files
    if "hf_tokenizer_name" in text:
        tokenizer = HFTokenizer(str(pieces(folder)), context_length=LENGTH, clean="canonicalize")
    save_for_hf(shaken(model), tokenizer, CONFIGS[name], str(folder), safe_serialization=safe)
    return model, preprocess


def of_transformers(kind, folder):
    """A model of transformers, written to a folder with a text tokenizer."""
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 51,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": WIDTH}, vision_config=vision))
    else:
        vision = {k: v for k, v in vision.items() if k != "image_size"} | {"num_patches": 16}
        model = Siglip2Model(Siglip2Config(text_config=text | {"projection_size": WIDTH}, vision_config=vision))
    shaken(model).save_pretrained(folder)
    pieces(folder)
    return model


def picture(seed=0, size=SIZE):
    """A random picture."""
    values = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())
