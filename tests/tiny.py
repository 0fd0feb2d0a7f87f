"""Models of a few thousand parameters with the shapes of real ones, and the same as command line options."""

import torch

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


def tokenizer(backbone=BACKBONE, branch=BRANCH, decoder=DECODER, seed=0):
    torch.manual_seed(seed)
    return build_tokenizer((backbone, None), branch, branch, decoder).eval()


def encoder(seed=0):
    from dataclasses import asdict

    torch.manual_seed(seed)
    return ImageTextEncoder(ImageTextConfig(asdict(BACKBONE), asdict(TEXT))).eval()


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
