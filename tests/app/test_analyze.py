"""`dualtoken analyze ...` on tiny models and folders with class folders."""

import json

import pytest
import torch
from PIL import Image

from dualtoken.app.analysis_figures import draw_clouds
from dualtoken.app.look import Branches, Reading
from dualtoken.cli import main
from dualtoken.core.images import to_float, to_picture
from dualtoken.data.scenes import Scenes
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        (place / "ab"[i % 2]).mkdir(exist_ok=True)
        to_picture(Scenes(32, "test")[i].image).save(place / "ab"[i % 2] / f"{i}.png")
    (place / "a" / "broken.jpg").write_text("no picture")
    return str(place)


def run(command, output, *options):
    assert main(["analyze", command, "--output", str(output), *options]) == 0
    return json.loads((output / f"{command.replace('-', '_')}.json").read_text())


def test_layers_of_two_backbones(folder, tmp_path, capsys):
    one = str(tiny.tokenizer_directory())
    tiny.encoder(seed=3).save_pretrained(tmp_path / "encoder")
    two = str(tmp_path / "encoder")
    found = run("layers", tmp_path, "--backbones", f"{one},{two}", "--data", folder, "--runs", "2", "--batch_size", "5")
    assert set(found["backbones"]) == {one, two}
    for value in found["backbones"].values():
        assert value["images"] == 24 and len(value["cosines"]) == 3 and "broken.jpg" in value["skipped"][0]
        assert value["suggested_pixel_layer"] == value["runs"][0][1] and "bicubic" in value["resize"]
    assert (tmp_path / "layers.png").stat().st_size > 5000
    assert "the suggested pixel layer is the last of the first run" in capsys.readouterr().out


def test_clusters_with_labels(folder, tmp_path):
    options = ("--backbone", str(tiny.tokenizer_directory()), "--data", folder, "--clusters", "4", "--layers", "1,3")
    found = run("clusters", tmp_path, *options)
    assert set(found["layers"]) == {"1", "3"} and found["images"] == 24
    assert all(sum(one["sizes"]) == 24 and len(one["sizes"]) == 4 for one in found["layers"].values())
    assert all(abs(one["agreement_with_labels"]) < 1 for one in found["layers"].values())
    assert Image.open(tmp_path / "clusters-layer-1.png").width > 200


def test_codebooks_with_labels(folder, tmp_path):
    found = run("codebooks", tmp_path, "--model", str(tiny.tokenizer_directory()), "--data", folder)
    for one in found["vocabularies"].values():
        assert one["codebook_size"] == 16 and len(one["entropy"]) == 2 and min(one["entropy"]) >= 0
        assert max(one["entropy"]) <= 4 and max(one["usage"]) <= one["used"] <= 1
    told = found["mutual_information"]
    assert len(told) == 3 and all(one["bits"] <= one["at_most"] + 1e-9 for one in told.values())
    assert found["labelled"] == found["images"] == 24 and (tmp_path / "codebooks.png").is_file()


def test_cost_of_a_tokenizer_of_a_model_and_of_a_shape(tmp_path, capsys):
    found = run("cost", tmp_path, "--model", str(tiny.tokenizer_directory()), "--repeats", "1")
    assert found["tokenizer"]["encode"]["seconds"] > 0 and "language_model" not in found
    model, processor = tiny.mllm()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    found = run("cost", tmp_path, "--model", str(tmp_path / "m"), "--repeats", "1", "--text", "6", "--training", "true")
    assert set(found["language_model"]["drawing one picture"]) == {"single", "dual"}
    assert "dual / single" in capsys.readouterr().out
    shape = run("cost", tmp_path, "--model", "siglip2-b-256")
    encode = shape["tokenizer"]["encode up to the code vectors"]
    assert encode["seconds"] is None and encode["flops"] > 30e9  # 256 positions through twelve layers of 7 M weights


def test_branches_of_two_encoders_and_of_codes(folder):
    directory = str(tiny.tokenizer_directory())
    images = next(iter(Reading(folder, tiny.SIZE, 6, 6, 0))).images
    layers, codes = Branches(directory, False, "--models"), Branches(directory, True, "--models")
    pixel, semantic = layers(images)
    assert pixel.shape == semantic.shape == (6, 4, 32) and not torch.allclose(pixel, semantic)
    model = layers.tokenizer
    with torch.no_grad():
        wanted = model.features(model.encode(to_float(images)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(codes(images), wanted, strict=True))


def test_pictures_come_in_the_same_random_order_each_time(folder):
    reading = Reading(folder, 8, 24, 7, seed=1)
    first, second = ([name for batch in reading for name in batch.names] for _ in range(2))
    assert first == second and first != sorted(first) and len(set(first)) == 24 == reading.used
    labels = next(iter(reading)).labels.tolist()
    assert 0 in labels and 1 in labels  # a batch is a sample of all classes


def test_a_map_of_features(folder, tmp_path):
    directory = str(tiny.tokenizer_directory())
    pytest.importorskip("umap")
    pair = f"{directory}+{directory}"
    found = run("feature-space", tmp_path, "--models", f"{directory},{pair}", "--data", folder, "--width", "16")
    assert found["models"][directory]["overlap"] == found["models"][pair]["overlap"]  # the same two branches
    assert (tmp_path / "feature_space.png").stat().st_size > 5000


def test_clouds_are_drawn(tmp_path):
    points = torch.randn(30, 2).numpy()
    assert (
        draw_clouds(tmp_path / "x/c.png", {"m": (points, points + 3, 0.1)}, ("pixel", "semantic")).stat().st_size > 5000
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layers", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["layers", "--images", "0"], "--images 0: give at least 1"),
        (["layers", "--backbones", ","], "--backbones is empty"),
        (["layers", "--backbones", "nowhere"], "--backbones nowhere"),
        (["clusters", "--layers", "2,9"], "--layers 2,9: give numbers from 1 to 6"),
        (["clusters", "--images", "4", "--clusters", "8"], "8 clusters of 4 pictures"),
        (["codebooks", "--model", "nowhere"], "--model nowhere: no such directory, and no preset"),
        (["feature-space", "--models", "a+b+c"], "--models a+b+c: A+B takes two encoders, 3 are given"),
        (["cost", "--model", "nowhere"], "--model nowhere"),
        (["cost", "--repeats", "0"], "--repeats 0: give at least 1"),
        (["cost", "--text", "0"], "--text 0: give at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(["analyze", *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message
