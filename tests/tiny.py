"""Models of a few thousand parameters with the shapes of real ones, and the same as command line options."""

import tempfile
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import torch

from dualtoken.mllm.parts import ModelConfig, SmallLLMConfig, from_parts, small_llm
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.backbone import BackboneConfig
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.decoder import DecoderConfig
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder, TextConfig
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.training.tokenizer import build_tokenizer

SIZE = 16  # px; patch 8, 4 positions
OVERRIDES = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": SIZE, "patch_size": 8}
BACKBONE = BackboneConfig("vit_base_patch16_siglip_256", OVERRIDES, pixel_layer=1)
BRANCH = BranchConfig(QuantizerConfig(codebook_size=16, code_dim=8, depth=2))
DECODER = DecoderConfig(channels=8, multipliers=(1, 1, 2, 2), blocks=1, z_channels=16)
TEXT = TextConfig(width=32, layers=1, heads=2, length=16, vocab_size=128)
LLM = SmallLLMConfig(width=32, layers=2, heads=2, kv_heads=1, mlp=48, context=128, vocab_size=320)
HEAD = VisualHeadConfig(width=16, layers=1, heads=2, embed_dim=8)
WORDS = ("a red circle and a blue star", "draw a picture of it", "what is the colour of the star ?", "tell a story")


def tokenizer(backbone=BACKBONE, branch=BRANCH, decoder=DECODER, seed=0):
    torch.manual_seed(seed)
    return build_tokenizer((backbone, None), branch, branch, decoder).eval()


def encoder(seed=0):
    from dataclasses import asdict

    torch.manual_seed(seed)
    return ImageTextEncoder(ImageTextConfig(asdict(BACKBONE), asdict(TEXT))).eval()


@lru_cache
def tokenizer_directory(seed=0):
    """Where `tokenizer(seed=seed)` is saved, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="dualtoken-tests-")
    _FOLDERS.append(folder)
    tokenizer(seed=seed).save_pretrained(folder.name)
    return Path(folder.name)


_FOLDERS = []


def mllm(seed=0, **changes):
    """(model, processor) of `from_parts` in evaluation mode; `changes` of ModelConfig, or of the LLM's config.

    The text tokenizer is byte-level and has learnt WORDS; 4 positions, depth 2, 16 codes, context 128.
    """
    vision = tokenizer_directory()
    torch.manual_seed(seed)
    of_llm = {f.name: changes.pop(f.name) for f in fields(SmallLLMConfig) if f.name in changes}
    llm, text_tokenizer = small_llm(WORDS, SmallLLMConfig(**vars(LLM) | of_llm))
    model, processor = from_parts(str(vision), llm, text_tokenizer, ModelConfig(**{"head": HEAD} | changes))
    return model.eval(), processor


@lru_cache
def mllm_directory():
    """Where `mllm()` is saved with its processor, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="dualtoken-tests-")
    _FOLDERS.append(folder)
    for part in mllm():
        part.save_pretrained(folder.name)
    return Path(folder.name)


def images(count=2, size=SIZE, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def recipe(**changes):
    """A run of train-tokenizer of a few steps, as the content of a YAML file."""
    quantizer = {"codebook_size": 16, "code_dim": 8, "depth": 2}
    return {
        "data": {"source": "scenes", "batch_size": 4},
        "evaluation": {"images": 4},
        "backbone": {"name": BACKBONE.name, "overrides": OVERRIDES, "pixel_layer": 1},
        "pixel": {"quantizer": quantizer},
        "semantic": {"quantizer": quantizer},
        "decoder": {"channels": 8, "multipliers": [1, 1, 2, 2], "blocks": 1, "z_channels": 16},
        "discriminator": {"channels": 8, "layers": 2, "start": 2},
        "phases": [{"steps": 2, "trains": ["pixel", "semantic", "decoder"]}, {"steps": 6}],
        "optim": {"lr": 1e-3, "warmup": 2},
        "loop": {"save_every": 2, "eval_every": 4, "log_every": 1, "tracker": "none"},
    } | changes


def mllm_recipe(**changes):
    """A run of train-mllm of a few steps a stage, as the content of a YAML file; its stages are those of the paper."""
    all_parts = {"projector": 2e-3, "head_projectors": 2e-3, "heads": 2e-3, "llm": 2e-3}
    everything = {"caption": 0.2, "vqa": 0.2, "text_to_image": 0.3, "edit": 0.1, "story": 0.1, "text": 0.1}

    def stage(trains, mixture):
        return {"trains": trains, "batch_size": 4, "mixture": mixture, "steps": 4}

    return {
        "vision_tokenizer": str(tokenizer_directory()),
        "small": {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 48, "context": 256, "vocab_size": 400},
        "model": {"head": {"width": 16, "layers": 1, "heads": 2, "embed_dim": 8}},
        "data": {"scenes": {"scenes": 12, "stories": 4}, "length": 256, "held_out": 1},
        "recipe": {
            "1": stage({"projector": 2e-3}, {"caption": 1.0}),
            "2": stage({"projector": 2e-3, "llm": 2e-3}, {"caption": 0.5, "vqa": 0.5}),
            "3": stage({"head_projectors": 2e-3, "heads": 2e-3}, {"text_to_image": 1.0}),
            "4-1": stage(all_parts, everything),
            "4-2": stage(all_parts, everything),
        },
        "optim": {"warmup": 0.25},
        "loop": {"save_every": 2, "eval_every": 0, "log_every": 1, "tracker": "none"},
    } | changes
