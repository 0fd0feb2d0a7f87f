"""The vision tokenizer: encoding against its bare backbone, decoding by memory format and with torch.compile.

Limit of encoding: the backbone's pass to the semantic layer, which no tokenizer on it can do without.
"""

from functools import partial

import torch

from benchmarks.measure import Case, Options, Work
from dualtoken.core.codes import DualCodes
from dualtoken.tokenizer.presets import open_tokenizer, shape_config
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 16, "patch_size": 8}


def cases(options: Options) -> list[Case]:
    """The miniature, and the paper's shapes at random: one picture on the CPU, 64 in bfloat16 on a GPU."""
    gpu = options.device != "cpu"
    batches = {"tiny": 2} if options.tiny else {"siglip-l-256": 64, "siglip-so400m-384": 64} if gpu else \
        {"mini": 64, "siglip-l-256": 1, "siglip-so400m-384": 1}  # fmt: skip
    made = []
    for name, batch in batches.items():
        group = f"{name}, {batch} picture{'s' if batch > 1 else ''}"
        made.append(Case(f"encode, {group}", "ours", "ours", partial(encode, name, batch, options)))
        made.append(Case(f"encode, {group}", "the backbone to the semantic layer", "limit",
                         partial(backbone, name, batch, options)))  # fmt: skip
        ways = {"as built": {}, "channels last": {"channels_last": True}}
        ways |= {"channels last, torch.compile": {"channels_last": True, "compiled": True}} if gpu else {}
        for way, chosen in ways.items():
            made.append(Case(f"decode, {group}", f"ours, {way}", "ours" if way == "as built" else "reference",
                             partial(decode, name, batch, options, **chosen)))  # fmt: skip
    return made


def tokenizer_of(name: str, options: Options) -> DualTokenVisionTokenizer:
    """The miniature, or a shape with random weights."""
    if name == "mini":
        return open_tokenizer(name).to(options.device)
    torch.manual_seed(0)
    with torch.device(options.device):
        made = DualTokenVisionTokenizer(tiny_config() if name == "tiny" else shape_config(name))
    return made.to(torch.float32 if options.device == "cpu" else torch.bfloat16).eval()


def tiny_config() -> DualTokenVisionConfig:
    codes = {"quantizer": {"codebook_size": 16, "code_dim": 8, "depth": 2}}
    decoder = {"channels": 8, "multipliers": (1, 1, 2, 2), "blocks": 1, "z_channels": 16}
    return DualTokenVisionConfig({"name": "vit_base_patch16_siglip_256", "overrides": TINY}, codes, codes, decoder)


def pictures(tokenizer: DualTokenVisionTokenizer, batch: int) -> torch.Tensor:
    side = tokenizer.image_size
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(tokenizer.device, tokenizer.dtype)


def encode(name: str, batch: int, options: Options) -> Work:
    tokenizer = tokenizer_of(name, options)
    images = pictures(tokenizer, batch)
    return Work(torch.no_grad()(lambda: tokenizer.encode(images)), batch, "images")


def backbone(name: str, batch: int, options: Options) -> Work:
    tokenizer = tokenizer_of(name, options)
    images, layers = pictures(tokenizer, batch), (tokenizer.backbone.semantic_layer,)
    return Work(torch.no_grad()(lambda: tokenizer.backbone.taps(images, layers)), batch, "images")


def decode(name: str, batch: int, options: Options, channels_last: bool = False, compiled: bool = False) -> Work:
    tokenizer = tokenizer_of(name, options)
    tokenizer.speed_up_decoder(channels_last, compiled)
    sizes = (batch, tokenizer.positions, tokenizer.pixel.quantizer.config.depth)
    codes = torch.randint(tokenizer.pixel.quantizer.config.codebook_size, sizes).to(options.device)
    codes = DualCodes(codes, codes)
    return Work(torch.no_grad()(lambda: tokenizer.decode(codes)), batch, "images")
