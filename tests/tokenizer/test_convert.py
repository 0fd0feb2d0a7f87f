import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.tokenizer.convert import convert_towers
from dualtoken.tokenizer.encoder import TextConfig, tokenize, train_text_tokenizer
from dualtoken.tokenizer.presets import open_encoder, open_tokenizer
from dualtoken.tokenizer.pretrained import open_image_text
from dualtoken.tokenizer.quantizer import Codebook, QuantizerConfig
from tests.tokenizer.reference import FIXTURE, infer, nearest, random_state, settings_of, stored_state


@pytest.fixture(scope="module")
def stored():
    outputs = load_file(FIXTURE / "infer.safetensors")
    flat = ("code_pix", "code_sem", *(f"latent_{n}_{k}" for n in ("pix", "sem") for k in ("prequant", "quantised")))
    outputs |= {name: outputs[name].flatten(1, 2) for name in flat}
    outputs["post_pix"] = outputs["post_quant_conv_in"].flatten(2).transpose(1, 2)
    outputs["post_sem"] = outputs["zq_sem_postquant"]
    return outputs | load_file(FIXTURE / "inputs.safetensors")


@pytest.fixture(scope="module")
def checkpoint():
    return stored_state()


def towers():
    return json.loads((FIXTURE / "siglip_init/config.json").read_text())


def check(tokenizer, encoder, expected):
    """Everything that the reference computes for inference."""
    images = expected["images"]
    codes = tokenizer.encode(images)
    assert torch.equal(codes.pixel, expected["code_pix"]) and torch.equal(codes.semantic, expected["code_sem"])
    backbone = tokenizer.backbone
    layers = (tokenizer.pixel.shortcut_layer, backbone.pixel_layer, backbone.semantic_layer)
    shortcut, pixel, semantic = backbone.taps(images, layers)
    out = tokenizer(images)
    found = {
        "latent_pix_prequant": tokenizer.pixel.latent(pixel, shortcut),
        "latent_sem_prequant": tokenizer.semantic.latent(semantic),
        "latent_pix_quantised": tokenizer.pixel.quantizer.lookup(codes.pixel),
        "latent_sem_quantised": tokenizer.semantic.quantizer.lookup(codes.semantic),
        "post_pix": tokenizer.features(codes)[0],
        "post_sem": tokenizer.features(codes)[1],
        "pooled": tokenizer.pool(tokenizer.features(codes)[1]),
        "recon": tokenizer.decoder(tokenizer.features(codes)[0]),
        "text_features": encoder.embed_text(expected["text"]),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert abs(out.pixel.commitment - expected["quant_loss_pix_eval"]) < 1e-5
    assert abs(out.semantic.commitment - expected["quant_loss_sem_eval"]) < 1e-5


def test_the_command_gives_what_the_reference_computes(tmp_path, stored):
    assert main(["convert", str(FIXTURE / "epoch_1.pt"), "--output", str(tmp_path)]) == 0
    tokenizer, encoder = open_tokenizer(str(tmp_path / "tokenizer")), open_encoder(str(tmp_path / "encoder"))
    with torch.no_grad():
        check(tokenizer, encoder, stored)
        assert encoder.logit_scale.item() == stored["logit_scale"].item()
        assert encoder.logit_bias.item() == stored["logit_bias"].item()
        images = F.normalize(encoder.backbone(stored["images"]), dim=-1)
    assert not torch.allclose(images, stored["image_features"], atol=1e-3)  # the reference's go through the codes
    torch.testing.assert_close(F.normalize(tokenizer.pool(tokenizer.features(tokenizer.encode(stored["images"]))[1]),
                                           dim=-1).detach(), stored["image_features"], atol=1e-4, rtol=0)  # fmt: skip


def test_the_restatement_for_other_sizes_is_the_reference(stored, checkpoint):
    settings = json.loads((FIXTURE / "config.json").read_text())
    found = infer(checkpoint, settings, towers(), stored["images"], stored["text"])
    for name, value in found.items():
        if value.dtype == torch.int64:
            assert torch.equal(value, stored[name])
        else:
            torch.testing.assert_close(value, stored[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("sizes", "width", "patch"),
    [
        ({"grid": 27, "latent": 24, "pix": (96, 16, 8), "sem": (32, 16, 8)}, 32, 7),
        ({"grid": 6, "latent": 6, "pix": (17, 8, 2), "sem": (50, 16, 3)}, 64, 8),
    ],
)
def test_checkpoints_of_other_sizes_compute_the_same(tmp_path, sizes, width, patch):
    torch.manual_seed(1)
    image_size = 8 * sizes["latent"]
    tower = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 2, "num_hidden_layers": 4}
    siglip = {
        "vision_config": {**tower, "image_size": image_size, "patch_size": patch},
        "text_config": {**tower, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": width},
    }
    settings = settings_of(**sizes, layers=(2, 3, 1))
    state = random_state(settings, SiglipModel(SiglipConfig(**siglip)))
    (tmp_path / "siglip_init").mkdir()
    SiglipConfig(**siglip).save_pretrained(tmp_path / "siglip_init")
    words = train_text_tokenizer(["a red star", "a blue ring"], TextConfig(length=8, vocab_size=40))
    words.save_pretrained(tmp_path / "siglip_init")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save({"epoch": 3, "name": "other", "state_dict": {f"module.{k}": v for k, v in state.items()},
                "optimizer": {}}, tmp_path / "epoch_3.pt")  # fmt: skip
    assert main(["convert", str(tmp_path / "epoch_3.pt"), "--output", str(tmp_path / "ours")]) == 0
    tokenizer = open_tokenizer(str(tmp_path / "ours/tokenizer"))
    images, text = torch.rand(2, 3, image_size, image_size) * 2 - 1, torch.randint(3, 40, (2, 8))
    expected = infer(state, settings, siglip, images, text) | {"images": images, "text": text}
    with torch.no_grad():
        check(tokenizer, open_encoder(str(tmp_path / "ours/encoder")), expected)
    both = open_image_text(str(tmp_path / "ours/encoder"))
    assert torch.equal(tokenize(both.tokenizer, ["a red ring"]), tokenize(words, ["a red ring"]))
    assert tokenizer.pixel.quantizer.config.depth == sizes["pix"][2]


# -- the reference's training-mode update, which ours differs from on purpose (docs/decisions.md) --


def moved(size, total, rows, codes, decay=0.99, eps=1e-5):
    """One moving-average step of the reference over rows [M, C] and codes [M]: counts, sums and the new table."""
    counts = F.one_hot(codes, len(size)).float()
    size = decay * size + (1 - decay) * counts.sum(0)
    total = decay * total + (1 - decay) * counts.t() @ rows
    smooth = (size + eps) / (size.sum() + len(size) * eps) * size.sum()
    return size, total, total / smooth[:, None]


def start(checkpoint, short):
    parts = ("weight", "cluster_size_ema", "embed_ema")
    weight, size, total = (checkpoint[f"quantizer_{short}.codebooks.0.{part}"].clone() for part in parts)
    return weight[:-1], size, total


def compare(found, expected, short):
    weight, size, total = found
    torch.testing.assert_close(weight, expected[f"train.after.{short}.weight"][:-1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(size, expected[f"train.after.{short}.cluster_size_ema"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(total, expected[f"train.after.{short}.embed_ema"], atol=2e-5, rtol=1e-5)


def test_the_references_pixel_update_moves_the_table_between_depths(stored, checkpoint):
    expected = load_file(FIXTURE / "train.safetensors")
    weight, size, total = start(checkpoint, "pix")
    residual, codes = stored["latent_pix_prequant"].flatten(0, 1), []
    for _ in range(4):
        codes.append(nearest(residual, weight))
        rows = weight[codes[-1]]  # of the table before this depth's step
        size, total, weight = moved(size, total, residual, codes[-1])
        residual = residual - rows
    assert torch.equal(torch.stack(codes, -1), expected["train.code_pix"].flatten(0, 2))
    compare((weight, size, total), expected, "pix")
    assert not torch.equal(stored["code_pix"].flatten(0, 1), torch.stack(codes, -1))  # training codes are others there


def test_the_references_semantic_update_feeds_the_last_residual_for_every_depth(stored, checkpoint):
    expected = load_file(FIXTURE / "train.safetensors")
    weight, size, total = start(checkpoint, "sem")
    residual, codes = stored["latent_sem_prequant"].flatten(0, 1), []
    for _ in range(4):
        codes.append(nearest(residual, weight))
        residual = residual - weight[codes[-1]]
    assert torch.equal(torch.stack(codes, -1), expected["train.code_sem"].flatten(0, 2))
    size, total, weight = moved(size, total, residual.repeat(4, 1), torch.cat(codes))
    compare((weight, size, total), expected, "sem")


def test_ours_moves_once_with_each_depths_own_residual(stored, checkpoint):
    weight, size, total = start(checkpoint, "sem")
    ours = Codebook(QuantizerConfig(codebook_size=64, code_dim=8, depth=4, restart_below=0))
    for name, value in (("weight", weight), ("cluster_size", size), ("embed_sum", total)):
        getattr(ours, name).copy_(value)
    residual, codes, residuals = stored["latent_sem_prequant"].flatten(0, 1), [], []
    for _ in range(4):
        codes.append(nearest(residual, weight))
        residuals.append(residual)
        residual = residual - weight[codes[-1]]
    ours.update(torch.stack(residuals), torch.stack(codes))
    counts = F.one_hot(torch.cat(codes), 64).float()
    torch.testing.assert_close(ours.cluster_size, 0.99 * size + 0.01 * counts.sum(0))
    torch.testing.assert_close(ours.embed_sum, 0.99 * total + 0.01 * counts.t() @ torch.cat(residuals))
    theirs = load_file(FIXTURE / "train.safetensors")["train.after.sem.embed_ema"]
    assert (ours.embed_sum - theirs).abs().max() > 0.1


# -- bad input --


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def write(tmp_path, loaded, settings=None):
    torch.save(loaded, tmp_path / "bad.pt", pickle_module=pickle)
    (tmp_path / "config.json").write_text(settings or (FIXTURE / "config.json").read_text())
    return [
        "convert",
        str(tmp_path / "bad.pt"),
        "--siglip",
        str(FIXTURE / "siglip_init"),
        "--output",
        str(tmp_path / "o"),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"extra.weight": torch.zeros(1)}, "extra.weight is unknown"),
        (lambda s: {k: v for k, v in s.items() if k != "decoder.conv_in.bias"}, "nothing for decoder.conv_in.bias"),
        (lambda s: s | {"quantizer_pix.codebooks.2.weight": torch.zeros(65, 8)}, "not a shared one"),
        (lambda s: s | {"prequant_sem.attn.zero_k_bias": torch.ones(64)}, "bias on its keys"),
        (lambda s: s | {"quantizer_sem.codebooks.0.weight": torch.zeros(33, 8),
                        **{f"quantizer_sem.codebooks.{d}.weight": torch.zeros(33, 8) for d in range(4)}},
         "is [32, 8], its JSON describes [64, 8]"),
        (lambda s: s | {"x": "text"}, "other than tensors"),
        (lambda s: {k: v for k, v in s.items() if ".codebooks.3." not in k}, "has 3 codebooks in quantizer_pix"),
        (lambda s: s | {f"quantizer_pix.codebooks.{d}.weight": torch.ones(65, 8) for d in range(4)}, "a row of zeros"),
    ],
)  # fmt: skip
def test_a_key_too_many_too_few_or_of_another_shape_is_named(tmp_path, checkpoint, change, words, capsys):
    arguments = write(tmp_path, {"state_dict": change(dict(checkpoint))})
    assert main(arguments) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_nothing_but_tensors_is_read(tmp_path, capsys):
    assert main(write(tmp_path, {"state_dict": {}, "optimizer": Evil()})) == 2
    out = capsys.readouterr()
    assert "not a tokenizer checkpoint" in out.err and "unpickled" not in out.out
    assert main(write(tmp_path, {"weights": 1})) == 2 and "no state_dict" in capsys.readouterr().err
    assert main(write(tmp_path, {"state_dict": {}}, "{}")) == 2 and "not the JSON" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pt")]) == 2


def test_a_description_without_a_part_names_it(tmp_path, capsys):
    settings = json.loads((FIXTURE / "config.json").read_text())
    del settings["rqvaesiglip"]["decoder_latent_shape"]
    arguments = write(tmp_path, {"state_dict": stored_state()}, json.dumps(settings))
    assert main(arguments) == 2
    assert "JSON has no 'decoder_latent_shape'" in capsys.readouterr().err


def test_weights_of_a_published_size_name_the_preset_that_fits(checkpoint):
    tower = "siglip_model.vision_model."
    state = dict(checkpoint)
    with torch.device("meta"):
        large = SiglipModel(SiglipConfig(vision_config={
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "image_size": 256, "patch_size": 16,
        }, text_config={"num_hidden_layers": 1})).vision_model  # fmt: skip
    state = {k: v for k, v in state.items() if not k.startswith(tower)}
    state |= {tower + k: torch.empty_like(v, device="meta") for k, v in large.state_dict().items()}
    words = r"patch_embedding.weight is .1024, 3, 16, 16. in the file, .64, 3, 8, 8. in the model; .* fit siglip-l"
    with pytest.raises(UserError, match=words):
        convert_towers(state, FIXTURE / "siglip_init")
