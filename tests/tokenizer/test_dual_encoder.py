"""The baseline of two separate encoders (appendix F.4) behind the same contract."""

import pytest
import torch
import yaml

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.mllm.parts import ModelConfig, from_parts, small_llm
from dualtoken.tokenizer.pixel_encoder import PixelEncoderConfig
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.training.tokenizer import build_tokenizer, set_trained
from tests import tiny

ENCODER = PixelEncoderConfig(channels=8, multipliers=(1, 1, 2, 2), blocks=1)


def two_encoders(seed=0):
    torch.manual_seed(seed)
    return build_tokenizer((tiny.BACKBONE, None), tiny.BRANCH, tiny.BRANCH, tiny.DECODER, ENCODER)


def test_pixel_codes_come_from_the_encoder_of_their_own_and_semantic_ones_from_the_backbone():
    model, images = two_encoders().eval(), tiny.images(2)
    with torch.no_grad():
        codes = model.encode(images)
        for name, changed in (("pixel", model.pixel_encoder), ("semantic", model.backbone.vit.blocks[0])):
            other = two_encoders().eval()
            part = dict(other.named_modules())[{"pixel": "pixel_encoder", "semantic": "backbone.vit.blocks.0"}[name]]
            assert type(part) is type(changed)
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter))
            moved = other.encode(images)
            assert torch.equal(moved.pixel, codes.pixel) == (name == "semantic")
            assert torch.equal(moved.semantic, codes.semantic) == (name == "pixel")
        assert codes.pixel.shape == codes.semantic.shape == (2, 4, 2)
        assert model.decode(codes).shape == images.shape


def test_the_backbone_stands_still_and_everything_else_learns():
    model, images = two_encoders(), tiny.images(2)
    set_trained(model, ("pixel", "semantic", "decoder", "pixel_encoder"))
    out = model(images)
    loss = (out.images - images).square().mean() + out.semantic.features.square().mean()
    (loss + out.pixel.commitment + out.semantic.commitment).backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns != name.startswith("backbone."), name


def test_naming_the_pixel_branch_does_not_train_the_pixel_encoder():
    model = two_encoders()
    set_trained(model, ("pixel",))
    learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"pixel"}


def test_it_is_trained_saved_opened_and_taken_by_the_language_model(tmp_path):
    sizes = {"channels": 8, "multipliers": [1, 1, 2, 2], "blocks": 1}
    phases = [{"steps": 2, "trains": ["pixel", "semantic", "decoder", "pixel_encoder"]}]
    recipe = tiny.recipe(output=str(tmp_path / "run"), pixel_encoder=sizes, phases=phases)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train-tokenizer", "--config", str(tmp_path / "recipe.yaml")]) == 0
    model = open_tokenizer(str(tmp_path / "run/model"))
    assert model.pixel_encoder is not None
    images = tiny.images(1)
    with torch.no_grad():
        codes = model.encode(images)
        built, processor = from_parts(
            str(tmp_path / "run/model"), *small_llm(tiny.WORDS, tiny.LLM), ModelConfig(head=tiny.HEAD)
        )
        picture = Picture("one", codes=codes)
        batch = processor.encode(ChatSample((Message("user", ("draw",)), Message("assistant", (picture,))), "t", "1"))
        assert batch is not None and built.look(images).pixel.equal(codes.pixel)


def test_an_image_that_does_not_halve_to_the_grid_is_named():
    with pytest.raises(UserError, match="2 halvings take 16 px to 4 positions a side, the semantic encoder has 2"):
        build_tokenizer(
            (tiny.BACKBONE, None), tiny.BRANCH, tiny.BRANCH, tiny.DECODER, PixelEncoderConfig(8, (1, 1, 2), 1)
        )
