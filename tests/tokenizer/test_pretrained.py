import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from dualtoken.core.errors import UserError
from dualtoken.tokenizer import read_open_clip
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.encoder import ImageTextEncoder, load_text_tokenizer, tokenize
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.tokenizer.initial import load_backbone
from dualtoken.tokenizer.pretrained import open_image_text, read_pretrained
from dualtoken.tokenizer.weights import check
from tests import tiny
from tests import tiny_pretrained as real


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever connects to anything fails the test."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def ours(pair, pictures, texts):
    """Unit vectors of pictures and of texts by an encoder of ours."""
    images = DualTokenImageProcessor(pair.encoder.backbone.image_size)(pictures)["pixel_values"]
    with torch.no_grad():
        return pair.encoder.embed_image(images), pair.encoder.embed_text(tokenize(pair.tokenizer, texts))


@pytest.mark.parametrize("name", real.CONFIGS)
def test_open_clip_directories_give_open_clips_embeddings(name, tmp_path):
    model, preprocess = real.of_open_clip(name, tmp_path / "theirs")
    pair = open_image_text(str(tmp_path / "theirs"))
    pictures = [real.picture(i) for i in range(2)]
    image, text = ours(pair, pictures, real.TEXTS)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'theirs'}")(real.TEXTS)
    with torch.no_grad():
        theirs = torch.stack([preprocess(p) for p in pictures])
        close(image, model.encode_image(theirs, normalize=True))
        close(text, model.encode_text(ids, normalize=True))
        close(pair.encoder.logits(image, text), model.get_logits(theirs, ids)[0])

    # and again from a directory of ours, with nothing of theirs left
    pair.save_pretrained(tmp_path / "ours")
    again = ImageTextEncoder.from_pretrained(tmp_path / "ours")
    ids = tokenize(load_text_tokenizer(tmp_path / "ours"), real.TEXTS)
    with torch.no_grad():
        assert torch.equal(again.embed_text(ids), text)
        assert torch.equal(again.backbone(tiny.images(2, 32)), pair.encoder.backbone(tiny.images(2, 32)))


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_transformers_directories_give_transformers_embeddings(kind, tmp_path):
    model = real.of_transformers(kind, tmp_path / "theirs")
    pair = open_image_text(str(tmp_path / "theirs"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ids = tokenizer(real.TEXTS, padding="max_length", max_length=real.LENGTH, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenize(pair.tokenizer, real.TEXTS), ids)
    images = tiny.images(2, real.SIZE)
    colors = torch.tensor(pair.encoder.config.backbone["mean"] or (0.5,) * 3).view(3, 1, 1)
    spread = torch.tensor(pair.encoder.config.backbone["std"] or (0.5,) * 3).view(3, 1, 1)
    pixels = ((images + 1) / 2 - colors) / spread
    extra = {}
    if kind == "siglip2":  # it takes rows of patches
        pixels = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        extra = {
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, **extra)
        image, text = pair.encoder.embed_image(images), pair.encoder.embed_text(ids)
        close(image, out.image_embeds)
        close(text, out.text_embeds)
        close(pair.encoder.logits(image, text), out.logits_per_image)
    assert (pair.encoder.config.backbone["mean"] is None) == (kind != "clip")

    pair.save_pretrained(tmp_path / "ours")
    again = ImageTextEncoder.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.embed_text(tokenize(load_text_tokenizer(tmp_path / "ours"), real.TEXTS)), text)
        assert torch.equal(again.embed_image(images), image)


def test_an_image_processor_in_the_directory_says_the_colors(tmp_path):
    real.of_transformers("siglip", tmp_path)
    colors = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colors))
    backbone = read_pretrained(str(tmp_path)).config.backbone
    assert backbone["mean"] == (0.4, 0.5, 0.6) and backbone["std"] == (0.2, 0.3, 0.4)


def test_a_name_with_a_file_reads_safetensors_bin_and_checkpoints(tmp_path):
    model, _ = real.of_open_clip("tiny-clip", tmp_path, safe="both")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "epoch_3.pt")
    wanted = ours(open_image_text(str(tmp_path)), [real.picture()], real.TEXTS)
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt"):
        found = ours(open_image_text(f"tiny-clip={tmp_path / file}"), [real.picture()], real.TEXTS)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    (tmp_path / "open_clip_model.safetensors").unlink()
    assert torch.equal(ours(open_image_text(str(tmp_path)), [real.picture()], real.TEXTS)[0], wanted[0])


def test_a_name_has_the_colors_that_were_published_for_it(tmp_path):
    for name in FAMILIES:
        found = read_open_clip._published_statistics(open_clip, name, tmp_path / "nowhere", name)
        assert found.get("mean", (0.5,))[0] == pytest.approx(0.5 if "SigLIP" in name else 0.4815, abs=1e-4)
        assert "https://huggingface.co/" in read_open_clip._published(open_clip, name)
    # one name has two; the config that was published with the weights tells which
    with pytest.raises(UserError, match="several color statistics"):
        read_open_clip._published_statistics(open_clip, "ViT-L-14", tmp_path / "nowhere", "ViT-L-14")
    (tmp_path / "config.json").write_text(json.dumps({"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    assert read_open_clip._published_statistics(open_clip, "ViT-L-14", tmp_path / "config.json", "ViT-L-14") == {}


FAMILIES = (  # of Tables 1 and 7 to 10
    "ViT-L-16-SigLIP-256",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-SO400M-16-SigLIP2-256",
    "ViT-L-14-quickgelu",
    "ViT-B-16-quickgelu",
    "ViT-H-14-quickgelu",
    "EVA02-L-14",
    "ViTamin-L-256",
    "ViTamin-XL-384",
)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith(("ViT-SO400M-16", "ViT-H", "EVA", "ViTamin-XL"))])
def test_published_shapes_fit_without_weights(name):
    """Every weight of the published architecture finds its place, on the meta device."""
    config = open_clip.get_model_config(name)
    model = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        state = model(**config).state_dict()
        backbone, tower = read_open_clip._backbone(config, {}, name), read_open_clip._text_tower(config, name)
        found = read_open_clip._assemble(backbone, tower, state, Path(), name)
    check(found, name)
    assert found.config.backbone["projection"] == (0 if "SigLIP" in name else config["embed_dim"])


def test_a_name_alone_says_what_to_download_and_which_option_takes_it():
    with pytest.raises(UserError) as error:
        open_image_text("ViT-H-14-quickgelu")
    for words in (
        "--encoder ViT-H-14-quickgelu",
        "open_clip_model.safetensors",
        "huggingface.co/apple/DFN5B-CLIP-ViT-H-14 ",
    ):
        assert words in str(error.value)
    assert str(error.value).endswith("--encoder ViT-H-14-quickgelu=FILE") and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no such file /nowhere.bin; download pytorch_model.bin of .*ViTamin-L-256px"):
        load_backbone("ViTamin-L-256=/nowhere.bin", BackboneConfig(""))
    with pytest.raises(UserError, match=r"QuickGELU: ViT-L-14-quickgelu"):
        open_image_text("ViT-L-14")


def test_mistakes_are_named(tmp_path, monkeypatch):
    real.register()
    real.of_open_clip("tiny-clip", tmp_path / "clip")
    real.of_open_clip("tiny-siglip", tmp_path / "siglip")
    file = tmp_path / "clip/open_clip_model.safetensors"
    trunk = tmp_path / "siglip/open_clip_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "resblocks.2.attn.out" not in k}, tmp_path / "less.safetensors")
    save_file(state | {"ln_final.weight": torch.ones(33)}, tmp_path / "wider.safetensors")
    save_file(state | {"text.surprise": torch.ones(1)}, tmp_path / "added.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    torch.save({"x": print}, tmp_path / "more.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.bin")
    for source, words in (
        (f"ViT-B-16={file}", r"visual.conv1.weight is \[64, 3, 8, 8\] in the file, \[768, 3, 16, 16\] in the model"),
        (f"tiny-siglip={file}", "open_clip's own transformer in the file, a trunk of timm in the architecture"),
        (f"tiny-clip={trunk}", "a trunk of timm in the file, open_clip's own transformer in the architecture"),
        (f"tiny-vitamin={trunk}", "its weights hold visual.trunk.patch_embed.proj.weight, for which the model has no"),
        (f"tiny-eva={trunk}", r"visual.trunk.pos_embed is \[1, 16, 32\] in the file, \[1, 17, 32\] in the model"),
        (f"tiny-clip={tmp_path / 'less.safetensors'}", "its weights have no backbone.vit.blocks.2.attn.proj.weight"),
        (f"tiny-clip={tmp_path / 'wider.safetensors'}", r"text.ln_final.weight is \[33\] in the file, \[32\] in the"),
        (
            f"tiny-clip={tmp_path / 'added.safetensors'}",
            "its weights hold text.surprise, for which the model has no place",
        ),
        (f"tiny-clip={tmp_path / 'cut.safetensors'}", "cut.safetensors cannot be read"),
        (f"tiny-clip={tmp_path / 'more.bin'}", "not weights of open_clip"),
        (f"tiny-clip={tmp_path / 'other.bin'}", "holds no open_clip model"),
        (f"RN50={file}", "has no likeness in timm"),
        (f"roberta-ViT-B-32={file}", "not one of open_clip's own"),
        ("nobody", r"no preset \(presets: mini\), and no architecture of open_clip"),
        ("ViT-L-15", r"near: ViT-L-14"),
        ("google/siglip-so400m-patch14-384", r"hf-hub:ORG/NAME"),
        (str(tmp_path), "neither config.json nor open_clip_config.json"),
    ):
        with pytest.raises(UserError, match=words):
            read_pretrained(source)
    (tmp_path / "siglip/tokenizer.json").unlink()
    read_pretrained(str(tmp_path / "siglip"))  # training needs no text
    with pytest.raises(UserError, match=r"no text tokenizer in it; put tokenizer.json.* of .*nobody/tiny-siglip"):
        open_image_text(str(tmp_path / "siglip"))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for source in (str(tmp_path / "clip"), f"tiny-clip={file}", "nobody"):
        with pytest.raises(UserError, match=r"pip install 'dualtoken\[clip\]'"):
            read_pretrained(source)


def test_a_transformers_directory_that_does_not_fit_its_config_is_refused(tmp_path):
    real.of_transformers("clip", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["vision_config"]["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"mlp.fc1.bias is \[51\] in the file, \[64\] in the model"):
        read_pretrained(str(tmp_path))
    written["vision_config"] |= {"intermediate_size": 51, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"its weights have no vision_model.encoder.layers.3"):
        read_pretrained(str(tmp_path))
    written["model_type"] = "bert"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"holds a 'bert' model; known are dualtoken-encoder, open_clip, siglip"):
        read_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    written["model_type"] = "clip"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="cannot be read"):
        read_pretrained(str(tmp_path))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_text_tokenizer_that_needs_another_package_names_it(tmp_path):
    real.of_transformers("siglip", tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "SiglipTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"SiglipTokenizer requires .*: pip install sentencepiece"):
        open_image_text(str(tmp_path))


def test_an_image_tower_alone_starts_a_backbone_but_reads_no_text(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 51}
    theirs = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **sizes)).eval()
    theirs.save_pretrained(tmp_path)
    shape, state = load_backbone(str(tmp_path), BackboneConfig("", pixel_layer=2))
    backbone = Backbone(shape).eval()
    backbone.load_state_dict(state)
    assert (backbone.pixel_layer, backbone.semantic_layer) == (2, 2)
    with torch.no_grad():
        close(backbone(tiny.images()), theirs(tiny.images()).pooler_output)
    with pytest.raises(UserError, match="an image tower alone"):
        open_image_text(str(tmp_path))


@pytest.mark.parametrize("name", ["tiny-clip-quickgelu", "tiny-eva", "tiny-vitamin"])
def test_a_tokenizer_on_projected_towers_pools_into_the_space_of_the_texts(name, tmp_path):
    real.of_open_clip(name, tmp_path / "theirs")
    start = load_backbone(str(tmp_path / "theirs"), BackboneConfig(""))
    backbone = Backbone(start[0]).eval()
    backbone.load_state_dict(start[1])
    images = tiny.images(2, real.SIZE)
    with torch.no_grad():
        for layer in range(backbone.layers + 1):
            (features,) = backbone.taps(images, (layer,))
            assert torch.equal(backbone.pool(features, layer), backbone(images))
        assert F.normalize(backbone(images)).shape == (2, 24) and backbone.pooled_width == 24


def test_a_hub_id_is_fetched_and_only_its_needed_files(tmp_path, monkeypatch):
    import huggingface_hub

    real.of_open_clip("tiny-clip", tmp_path, safe="both")
    asked = {}
    present = [p.name for p in tmp_path.iterdir()] + ["pytorch_model.bin", "README.md"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository: present)

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    pair = open_image_text("hf-hub:nobody/tiny")
    assert pair.encoder.backbone.image_size == real.SIZE and asked["repository"] == "nobody/tiny"
    assert asked["allow_patterns"] == ["*.json", "*.txt", "*.model", "open_clip_model.safetensors"]
    monkeypatch.undo()
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository: 1 / 0)
    with pytest.raises(UserError, match=r"--encoder hf-hub:nobody/tiny: cannot be fetched \(division"):
        open_image_text("hf-hub:nobody/tiny")
