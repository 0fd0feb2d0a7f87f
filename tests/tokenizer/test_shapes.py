"""The tokenizers of the paper by name, on the meta device, and one training step of each family at tiny width."""

from dataclasses import replace

import pytest
import torch
import yaml

from dualtoken.cli import RECIPES, main
from dualtoken.tokenizer.backbone import BackboneConfig
from dualtoken.tokenizer.presets import fitting_shape, meta_tokenizer, shapes
from tests import tiny

# name -> positions, class tokens, width, blocks, pixel layer, D, px, millions of parameters of the backbone (timm's)
# and of the whole tokenizer. Layers: Tables 7 to 9 of the paper, "first quarter" where it names none.
SHAPES = {
    "siglip2-b-256": (256, 0, 768, 12, 3, 4, 256, 92.93, 148.5),
    "siglip-l-256": (256, 0, 1024, 24, 6, 4, 256, 315.96, 380.9),
    "siglip-l-256-rvq8": (256, 0, 1024, 24, 6, 8, 256, 315.96, 380.9),
    "siglip2-l-256": (256, 0, 1024, 24, 6, 8, 256, 315.96, 380.9),
    "siglip-so400m-384": (729, 0, 1152, 27, 6, 8, 384, 428.23, 498.8),
    "siglip2-so400m-256": (256, 0, 1152, 27, 6, 8, 256, 427.89, 498.5),
    "clip-l-224": (256, 1, 1024, 24, 6, 8, 224, 303.18, 368.1),
    "dfn-b-224": (196, 1, 768, 12, 3, 8, 224, 85.80, 141.3),
    "dfn-l-224": (256, 1, 1024, 24, 6, 8, 224, 303.18, 368.1),
    "dfn-h-224": (256, 1, 1280, 32, 8, 8, 224, 630.77, 707.7),
    "eva02-l-224": (256, 1, 1024, 24, 6, 8, 224, 303.32, 368.2),
    "vitamin-l-256": (256, 0, 1024, 31, 7, 8, 256, 332.59, 397.5),
    "vitamin-xl-384": (576, 0, 1152, 32, 6, 8, 384, 434.73, 505.3),
    "dual-encoder": (256, 0, 1024, 24, 6, 4, 256, 315.96, 733.8),
}


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_every_shape_is_listed_here():
    assert set(shapes()) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_papers_grid_width_taps_and_size(name):
    positions, prefix, width, blocks, pixel, depth, side, backbone, whole = SHAPES[name]
    model = meta_tokenizer(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    tower = model.backbone
    assert (model.positions, tower.prefix, tower.width, tower.layers) == (positions, prefix, width, blocks)
    assert (tower.pixel_layer, tower.semantic_layer) == (pixel, blocks - 1)
    assert model.image_size == model.decoder.image_size == side
    for branch in (model.pixel, model.semantic):
        sizes = branch.quantizer.config
        assert (sizes.codebook_size, sizes.code_dim, sizes.depth) == (16384, 32, depth)
    assert millions(tower) == pytest.approx(backbone, abs=0.01)
    assert millions(model) == pytest.approx(whole, abs=0.1)
    assert (model.pixel_encoder is None) == (name != "dual-encoder")


def test_the_shape_that_fits_weights_is_found():
    assert fitting_shape(1152, 27, 729) == "siglip-so400m-384"
    assert fitting_shape(1152, 27, 100) is None


TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 16, "patch_size": 8}
FAMILIES = {  # every timm architecture that a shape names, made tiny; ViTamin's convolutions have fixed widths
    "siglip": ("vit_large_patch16_siglip_256", TINY),
    "so400m": ("vit_so400m_patch14_siglip_384", TINY),
    "clip": ("vit_large_patch14_clip_quickgelu_224", TINY),
    "dfn": ("vit_huge_patch14_clip_224", TINY),
    "eva02": ("eva02_large_patch14_clip_224", TINY),
    "vitamin": ("vitamin_small_224", {"depth": 2, "img_size": 32}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_runs_and_takes_a_training_step(family):
    name, overrides = FAMILIES[family]
    side = overrides["img_size"]
    decoder = replace(tiny.DECODER, multipliers=(1, 1, 1, 2, 2)) if side == 32 else tiny.DECODER
    model = tiny.tokenizer(BackboneConfig(name, overrides, pixel_layer=1), decoder=decoder).train()
    images = torch.rand(2, 3, side, side) * 2 - 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = model(images)
    assert out.images.shape == images.shape
    assert out.semantic.codes.shape[1] == model.positions + model.backbone.prefix
    loss = (out.images - images).square().mean() + out.pooled.square().mean()
    (loss + out.pixel.commitment + out.semantic.commitment).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"backbone", "pixel", "semantic", "decoder"}
    with torch.no_grad():
        assert model.eval().decode(model.encode(images)).shape == images.shape


def test_info_counts_a_shape_without_weights(capsys):
    assert main(["info", "siglip2-b-256"]) == 0
    out = capsys.readouterr().out
    assert "148,452,675" in out and "256 = 16 x 16" in out and "14336 bits an image" in out
    assert main(["info", "siglip3"]) == 2
    assert "siglip-l-256" in capsys.readouterr().err


def test_shapes_are_recipes_of_the_training_command():
    from jsonargparse import ArgumentParser

    from dualtoken.training.tokenizer import train_tokenizer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(train_tokenizer, sub_configs=True)
    for name in SHAPES:
        path = RECIPES / f"{name}.yaml"
        settings = parser.parse_args(["--config", str(path), "--pixel.quantizer.kind", "mcq"])
        made = parser.instantiate(settings)
        assert made.backbone.name == yaml.safe_load(path.read_text())["backbone"]["name"]
        assert made.pixel.quantizer.kind == "mcq" and made.semantic.quantizer.kind == "rvq"
