import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes
from dualtoken.tokenizer.backbone import BackboneConfig
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.tokenizer.presets import open_tokenizer, tokenizer_directory
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer, reconstruct
from dualtoken.training.tokenizer import write_model
from tests import tiny

EVA = BackboneConfig(
    "eva02_base_patch14_224", {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 16, "patch_size": 8}
)
CLIP = BackboneConfig("vit_base_patch16_clip_224", tiny.OVERRIDES)


@pytest.mark.parametrize(("backbone", "prefix"), [(tiny.BACKBONE, 0), (CLIP, 1), (EVA, 1)])
def test_contract_of_encode_features_decode_pool_forward(backbone, prefix):
    model, images = tiny.tokenizer(backbone), tiny.images(3)
    with torch.no_grad():
        codes, out = model.encode(images), model(images)
        pixel, semantic = model.features(codes)
        assert codes.pixel.shape == (3, 4, 2) and codes.semantic.shape == (3, 4 + prefix, 2)
        assert pixel.shape == (3, 4, 32) and semantic.shape == (3, 4 + prefix, 32)
        assert torch.equal(out.pixel.codes, codes.pixel) and torch.equal(out.semantic.codes, codes.semantic)
        assert torch.equal(out.pixel.features, pixel) and torch.equal(out.semantic.features, semantic)
        assert torch.equal(model.decode(codes), out.images.clamp(-1, 1))
        assert torch.equal(model.pool(semantic), out.pooled) and out.pooled.shape == (3, 32)
        assert torch.equal(reconstruct(model, images), model.decode(codes))


def test_pictures_come_from_pixel_codes_alone_and_meaning_from_semantic_ones():
    model, images = tiny.tokenizer(), tiny.images(2)
    with torch.no_grad():
        codes = model.encode(images)
        mixed = DualCodes(codes.pixel, codes.semantic.flip(0))
        assert torch.equal(model.decode(mixed), model.decode(codes))
        assert not torch.equal(model.pool(model.features(mixed)[1]), model.pool(model.features(codes)[1]))


@pytest.mark.parametrize("backbone", [tiny.BACKBONE, CLIP, EVA])
def test_a_directory_alone_brings_the_model_back(tmp_path, backbone):
    model, images = tiny.tokenizer(backbone), tiny.images()
    write_model(model, tmp_path, torch.float32)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "dualtoken-tokenizer"
    with torch.no_grad():
        wanted = model(images)
        for found in (DualTokenVisionTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            out = found(images)
            assert not found.training
            assert torch.equal(out.images, wanted.images) and torch.equal(out.pooled, wanted.pooled)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    write_model(tiny.tokenizer(), tmp_path, torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["decoder.conv_out.weight"].dtype == torch.float16
    model = DualTokenVisionTokenizer.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_image_processor_prepares_and_inverts(tmp_path):
    write_model(tiny.tokenizer(), tmp_path, torch.float32)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, DualTokenImageProcessor) and processor.size == 16
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    array = torch.from_numpy(pixels).permute(2, 0, 1)
    for picture in (pixels, array, Image.fromarray(pixels), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        values = processor(picture)["pixel_values"]
        assert values.shape == (1, 3, 16, 16) and torch.equal(to_bytes(values)[0], array)
    assert processor([pixels, pixels])["pixel_values"].shape == (2, 3, 16, 16)
    assert np.array_equal(np.array(processor.postprocess(processor(pixels)["pixel_values"])[0]), pixels)


def harmed(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("decoder.conv_out.bias"), "missing keys.*decoder.conv_out.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected keys.*extra"),
        (lambda s: s.update({"decoder.conv_out.bias": torch.ones(9)}), "decoder.conv_out.bias|do not fit"),
    ],
)
def test_loading_is_strict(tmp_path, change, words):
    write_model(tiny.tokenizer(), tmp_path, torch.float32)
    harmed(tmp_path, change)
    with pytest.raises(UserError, match=words):
        DualTokenVisionTokenizer.from_pretrained(tmp_path)


def test_wrong_directories_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--model .*no such directory, and no preset"):
        open_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--model .*no config.json"):
        open_tokenizer(str(tmp_path))
    tiny.encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'dualtoken-encoder' model, 'dualtoken-tokenizer' is needed"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        open_tokenizer(str(tmp_path))


def test_wrong_image_side_is_one_line():
    with pytest.raises(UserError, match="24 x 24 given to a backbone of 16 x 16"):
        tiny.tokenizer().encode(tiny.images(1, 24))


def test_bundled_model_is_half_precision_and_small():
    directory = tokenizer_directory("mini")
    model = open_tokenizer("mini")
    assert json.loads((directory / "preprocessor_config.json").read_text())["size"] == model.image_size == 48
    sizes = {part.name: sum(p.stat().st_size for p in part.rglob("*")) for part in directory.parent.iterdir()}
    assert sizes["tokenizer"] + sizes["encoder"] < 16 * 2**20 and sum(sizes.values()) < 48 * 2**20
    assert load_file(directory / "model.safetensors")["decoder.conv_out.weight"].dtype == torch.float16


def test_arrays_of_any_layout_show_the_same_picture():
    processor = DualTokenImageProcessor(size=8)
    gray = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    wanted = processor(Image.fromarray(gray).convert("RGB"))["pixel_values"]
    opaque = np.full((8, 8, 1), 255, np.uint8)
    color = np.repeat(gray[..., None], 3, -1)
    for array in (gray, gray[..., None], gray[None], color, np.moveaxis(color, -1, 0), np.dstack([color, opaque])):
        assert torch.equal(processor(array)["pixel_values"], wanted), array.shape


@pytest.mark.parametrize(("channels_last", "compiled"), [(True, False), (False, True), (True, True)])
def test_a_faster_decoder_draws_the_same(channels_last, compiled, monkeypatch):
    model = tiny.tokenizer().eval()
    codes = model.encode(tiny.images(2))
    plain = model.decode(codes)
    build = model.decoder.compile  # traced, without the minutes of a compiler
    monkeypatch.setattr(model.decoder, "compile", lambda **told: build(backend="eager", **told), raising=False)
    model.speed_up_decoder(channels_last, compiled)
    assert torch.allclose(model.decode(codes), plain, atol=1e-5)
