import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from dualtoken.cli import main
from dualtoken.core.images import to_bytes, to_float, to_picture
from dualtoken.data.scene_text import captions
from dualtoken.data.scenes import Scenes, scene
from dualtoken.eval.commands import reconstruction, retrieval, zero_shot
from dualtoken.eval.reconstruction import evaluate_reconstruction, teacher_distance
from dualtoken.eval.report import table, write_json
from dualtoken.eval.scene_factors import SceneFactors
from dualtoken.eval.scene_factors import factors as values_of
from dualtoken.eval.zero_shot import accuracy, embed_codes, factor_accuracy, quantized_embed
from dualtoken.eval.zero_shot import retrieval as recall
from dualtoken.tokenizer.encoder import train_text_tokenizer
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.tokenizer import reconstruct
from tests import tiny


def test_psnr_and_ssim_equal_scikit_image():
    model = open_tokenizer("mini")
    pixels = torch.stack([Scenes(48, "test")[i].image for i in range(6)])
    result = evaluate_reconstruction(model, pixels.split(4))
    found = to_bytes(reconstruct(model, to_float(pixels)))
    pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(pixels, found, strict=True)]
    psnr = np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs])
    ssim = np.mean(
        [
            structural_similarity(a, b, channel_axis=2, gaussian_weights=True, use_sample_covariance=False)
            for a, b in pairs
        ]
    )
    assert result.psnr == pytest.approx(psnr, abs=0.02) and result.ssim == pytest.approx(ssim, abs=0.01)
    assert result.images == 6 and result.lpips is None and np.isnan(result.teacher_frechet)


def test_frechet_distance_tells_good_from_bad_reconstruction():
    pixels = torch.stack([Scenes(16, "test")[i].image for i in range(40)])
    good, bad = tiny.tokenizer(seed=0), tiny.tokenizer(seed=0)
    good.decode = lambda codes: to_float(pixels[: len(codes)]) * 0.98
    teacher = tiny.tokenizer(seed=1).backbone
    near, far = (evaluate_reconstruction(m, [pixels], teacher) for m in (good, bad))
    assert near.teacher_frechet < 0.1 * far.teacher_frechet and near.psnr > far.psnr + 10
    kept, codes = teacher_distance(teacher), []
    for model, found in ((good, near), (bad, far), (good, near)):  # true pictures go through the teacher once
        assert evaluate_reconstruction(model, [pixels], kept, seen=codes.append) == found
        assert kept.real_features_num_samples == 40 and kept.fake_features_num_samples == 0
    assert torch.equal(quantized_embed(bad)(to_float(pixels)), embed_codes(bad, codes[1]))


@pytest.mark.slow
def test_fid_with_weights_in_torch_fidelity_format(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"x": print}, tmp_path / "pickle.pth")  # more than tensors
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    for name, words in (
        ("nowhere.pth", "published as torch-fidelity's"),
        ("text.pth", "not torch-fidelity's"),
        ("pickle.pth", "not torch-fidelity's"),
        ("other.pth", "not torch-fidelity's"),
    ):
        assert main(["eval", "reconstruction", "--images", "4", "--inception_weights", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    extractor = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
    with monkeypatch.context() as patch:  # torch-fidelity builds its network only together with a file of weights
        patch.setattr(f"{extractor}.load_state_dict", lambda self, state: None)
        network = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(tmp_path / "other.pth")).inception
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    pixels = torch.stack([Scenes(16, "test")[i].image for i in range(4)])
    assert evaluate_reconstruction(tiny.tokenizer(), [pixels], inception=str(tmp_path / "inception.pth")).fid > 0


def test_usage_counts_every_code_once():
    model = tiny.tokenizer()
    pixels = torch.stack([Scenes(16, "test")[i].image for i in range(10)])
    codes = model.encode(to_float(pixels))
    result = evaluate_reconstruction(model, pixels.split(3))
    assert result.pixel_usage == len(codes.pixel.unique()) / 16
    assert result.semantic_usage == len(codes.semantic.unique()) / 16


def test_accuracy_retrieval_and_factors_by_hand():
    eye = torch.eye(4)
    assert accuracy(eye, eye, torch.tensor([0, 1, 2, 0])) == 0.75
    # classes 2 * color + shape
    assert factor_accuracy(eye, eye, torch.tensor([0, 0, 1, 1]), [[0, 1], [2, 3]]) == 1.0
    assert factor_accuracy(eye, eye, torch.tensor([0, 1, 0, 0]), [[0, 2], [1, 3]]) == 0.75
    swapped = eye[[1, 0, 2, 3]]
    assert recall(swapped, eye, [["a"], ["b"], ["c"], ["d"]]) == (0.5, 0.5)
    assert recall(swapped, eye, [["a"], ["a"], ["c"], ["d"]]) == (1.0, 1.0)  # equal captions are both right


def test_bundled_model_keeps_pictures_and_meaning(tmp_path):
    """The measured values of recipes/README.md, with room for the smaller number of pictures."""
    found = reconstruction("mini", images=120, output=str(tmp_path / "r.json"))
    assert found["psnr"] > 27.5 and found["ssim"] > 0.89
    assert found["pixel_usage"] > 0.5 and found["semantic_usage"] > 0.5
    labels = zero_shot("mini", images=120)
    assert min(labels[f]["teacher"] for f in ("color", "shape", "jointly")) > 0.97
    assert all(labels[f]["codes"] >= labels[f]["teacher"] - 0.02 for f in ("color", "shape", "jointly", "background"))
    pairs = retrieval("mini", images=120)
    assert all(pairs[d]["codes"] > 0.8 for d in ("text_to_image", "image_to_text"))
    assert json.loads((tmp_path / "r.json").read_text())["psnr"] == found["psnr"]


def test_factors_are_read_from_the_right_descriptions():
    encoder = tiny.encoder()
    texts = train_text_tokenizer([Scenes(16)[i].caption for i in range(200)], tiny.TEXT)
    factors = SceneFactors(encoder, texts)
    assert len(factors.combinations) == 8 * 6 * 2 * 5 * 6
    scenes = [s for s in (scene(i, "test") for i in range(60)) if len(s.objects) == 1]
    factors.vectors = torch.eye(len(factors.combinations))  # a text tower that tells all descriptions apart
    at = [factors.combinations.index(values_of(s)) for s in scenes]
    assert set(factors.accuracy(factors.vectors[at], scenes).values()) == {1.0}
    shifted = factors.accuracy(factors.vectors[[i - i % 6 + (i + 1) % 6 for i in at]], scenes)  # another background
    assert shifted.pop("background") == 0.0 and set(shifted.values()) == {1.0}


def test_a_folder_with_classes_and_captions(tmp_path, capsys):
    for i in range(12):
        sample = Scenes(64, "test")[i]
        if sample.label >= 0:
            place = tmp_path / Scenes.classes[sample.label].replace(" ", "_") / f"{i}.png"
            place.parent.mkdir(exist_ok=True)
            to_picture(sample.image).save(place)
    (tmp_path / "cut.png").write_text("no picture")
    folder = str(tmp_path)
    found = zero_shot("mini", data=folder)
    assert found["accuracy"]["codes"] == 1.0 and "cut.png" in found["skipped"][0]
    assert retrieval("mini", data=folder)["text_to_image"]["codes"] > 0.5
    assert "skipped 1 pictures" in capsys.readouterr().out


def test_a_model_without_encoder_asks_for_it(tmp_path, capsys):
    tiny.tokenizer().save_pretrained(tmp_path)
    assert main(["eval", "zero-shot", "--model", str(tmp_path)]) == 2
    assert f"--encoder is needed with --model {tmp_path}" in capsys.readouterr().err
    assert main(["eval", "reconstruction", "--model", str(tmp_path), "--images", "4"]) == 0


def test_tables_align_and_json_has_no_nan(tmp_path):
    lines = table(("a", "b"), [("long name", 1.23456), ("x", None)]).splitlines()
    assert lines[2].endswith("1.235") and lines[3].endswith("-") and len({len(x) for x in lines}) == 1
    write_json(tmp_path / "sub/x.json", {"a": float("nan"), "b": {"c": [float("inf"), 1.0]}})
    assert json.loads((tmp_path / "sub/x.json").read_text()) == {"a": None, "b": {"c": [None, 1.0]}}


def test_pictures_without_a_caption_are_left_out_of_retrieval(tmp_path, capsys):
    for index in range(6):
        shown = scene(index, "test")
        Image.fromarray(shown.render(64)).save(tmp_path / f"{index}.png")
        if index < 4:
            (tmp_path / f"{index}.txt").write_text(captions(shown)[0])
    found = retrieval(data=str(tmp_path))
    assert found["images"] == found["captions"] == 4 and found["without_caption"] == 2
    assert "2 pictures without a caption were left out" in capsys.readouterr().out
