import csv
import json
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
from timm.data import ImageNetInfo

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_picture
from dualtoken.data.captions import CaptionedImages, read_captions
from dualtoken.data.images import ImageFolder, read_in_order
from dualtoken.data.scenes import Scenes
from dualtoken.eval.prompts import class_names, prompt_templates
from dualtoken.eval.zero_shot import class_vectors, retrieval
from dualtoken.tokenizer.backbone import BackboneConfig
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.decoder import DecoderConfig
from dualtoken.tokenizer.initial import load_backbone
from dualtoken.tokenizer.pretrained import open_image_text
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.training.tokenizer import build_tokenizer
from tests import tiny
from tests import tiny_pretrained as real

WNIDS = ("n01440764", "n02085620", "n15075141")  # the first, the 152nd and the last of ImageNet-1k
CAPTIONS = {
    "1000_a.jpg": ["a red star", "a star , in red", 'a "star"', "one star", "something red"],
    "2000_b.jpg": ["two dogs run", "dogs", "dogs running on grass", "two brown dogs", "animals"],
    "3000_c.jpg": ["a blue ring", "ring", "the ring is blue", "blue", "round"],
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP of open_clip, and a tokenizer that starts from it: (name for --encoder, directory, open_clip's)."""
    folder = tmp_path_factory.mktemp("clip")
    model, _ = real.of_open_clip("tiny-clip-quickgelu", folder / "encoder")
    name = f"tiny-clip-quickgelu={folder / 'encoder/open_clip_model.safetensors'}"
    branch = BranchConfig(QuantizerConfig(codebook_size=16, code_dim=8, depth=2))
    decoder = DecoderConfig(channels=8, multipliers=(1, 1, 2, 2), blocks=1, z_channels=16)
    torch.manual_seed(0)
    made = build_tokenizer(load_backbone(name, BackboneConfig("")), branch, branch, decoder)
    made.save_pretrained(folder / "tokenizer")
    return name, str(folder / "tokenizer"), model


def pictures(folder, names, size=40):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        to_picture(Scenes(size, "test")[i].image).save(folder / name)


def test_class_vectors_of_imagenet_equal_open_clips(clip):
    pair = open_image_text(clip[0])
    names, prompts = class_names("imagenet", WNIDS), prompt_templates("openai")
    assert names == ["tench", "Chihuahua", "toilet paper"] and len(prompts) == 80
    found = class_vectors(pair.encoder, pair.tokenizer, names, prompts)
    with torch.no_grad():
        wanted = open_clip.build_zero_shot_classifier(
            clip[2], pair.tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
        )
    torch.testing.assert_close(found, wanted.t(), atol=1e-4, rtol=0)


def test_wordnet_ids_in_sorted_order_are_open_clips_order():
    synsets = ImageNetInfo().label_names()
    assert synsets == sorted(synsets) and class_names("imagenet", synsets) == list(open_clip.IMAGENET_CLASSNAMES)
    assert class_names("imagenet", ("0", "999")) == ["tench", "toilet paper"]  # labels of webdataset shards


def test_names_and_templates_come_from_files_too(tmp_path):
    (tmp_path / "names.txt").write_text("great white shark\nhot dog\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}\na drawing of {}\n")
    assert class_names(str(tmp_path / "names.txt"), ("a", "b")) == ["great white shark", "hot dog"]
    assert class_names(None, ("red_star", "b")) == ["red star", "b"]
    assert prompt_templates(str(tmp_path / "prompts.txt")) == ["a photo of a {}", "a drawing of {}"]
    assert prompt_templates("a {}, really") == ["a {}, really"] and len(prompt_templates("simple")) == 7
    for call, words in (
        (lambda: class_names(str(tmp_path / "names.txt"), ("a", "b", "c")), "2 names for 3 class folders"),
        (lambda: class_names("imagenette", ("a",)), "no such file"),
        (lambda: class_names("imagenet", ("tench",)), "folder 'tench' is neither a WordNet id"),
        (lambda: prompt_templates("openia"), "no place"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_zero_shot_on_an_imagenet_folder_as_a_command(clip, tmp_path, capsys):
    name, tokenizer, _ = clip
    pictures(tmp_path / "val", [f"{wnid}/ILSVRC2012_val_{i:08}.png" for wnid in WNIDS for i in range(3)])
    (tmp_path / "val" / WNIDS[0] / "broken.jpg").write_text("no picture")
    options = ["--model", tokenizer, "--encoder", name, "--data", str(tmp_path / "val"), "--classes", "imagenet"]
    options += ["--templates", "openai", "--output", str(tmp_path / "r.json")]
    assert main(["eval", "zero-shot", *options]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["images"] == 9 and found["classes"] == 3 and "broken.jpg" in found["skipped"][0]
    assert set(found["accuracy"]) == {"codes", "teacher"}
    assert "9 pictures, 3 classes, 80 prompts a class" in capsys.readouterr().out
    assert main(["eval", "zero-shot", *options[:2], "--data", str(tmp_path / "val")]) == 2
    assert "--encoder is needed" in capsys.readouterr().err
    assert main(["eval", "zero-shot", *options[:3], "mini", *options[4:6]]) == 2
    assert "--encoder mini takes 48 px and gives features of width 128" in capsys.readouterr().err
    assert main(["eval", "reconstruction", *options[:6], "--images", "4"]) == 0


def test_table1_at_full_scale_is_measured_as_the_commands_do(clip, tmp_path, capsys):
    name, tokenizer, _ = clip
    pictures(tmp_path / "val", [f"{wnid}/ILSVRC2012_val_{i:08}.png" for wnid in WNIDS for i in range(3)])
    (tmp_path / "val" / WNIDS[0] / "broken.jpg").write_text("no picture")
    options = ["--weights", tokenizer, "--encoder", name, "--data", str(tmp_path / "val")]
    command = ["reproduce", "table1", "--scale", "full", "--out", str(tmp_path / "out"), *options]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/table1.json").read_text())
    shown = found["protocol"]["zero_shot"]
    assert shown["prompts"] == "openai" and shown["prompts_a_class"] == 80 and shown["images"] == 9
    assert "broken.jpg" in found["skipped"][0] and any("No rFID without --inception" in f for f in found["findings"])
    page = (tmp_path / "out/table1.md").read_text()
    assert "full scale" in page and "1 pictures could not be read" in page and "prompts_a_class" in page
    for wrong, words in (
        (["--pictures", "0"], "--pictures 0: give at least 1"),
        (["--inception", "nowhere"], "--inception nowhere: no such file; it is published as torch-fidelity's"),
        (["--weights", "nowhere"], "--weights nowhere"),
    ):
        assert main([*command, *wrong]) == 2 and words in capsys.readouterr().err


def test_fewer_pictures_than_there_are_still_cover_all_classes(tmp_path):
    pictures(tmp_path, [f"{label}/{i}.png" for label in "abcd" for i in range(6)])
    source = ImageFolder(tmp_path, 16)
    labels = [b.labels for b in read_in_order(source, 8, 3, [])]
    assert torch.cat(labels).bincount().tolist() == [2, 2, 2, 2]


def kaggle(path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((name, text) for name, texts in CAPTIONS.items() for text in texts)
    return path


def first_published(path):
    lines = [f"{name}#{i}\t{text}" for name, texts in CAPTIONS.items() for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_both_formats_of_flickr8k_read_the_same(tmp_path):
    assert read_captions(kaggle(tmp_path / "captions.txt")) == CAPTIONS
    assert read_captions(first_published(tmp_path / "Flickr8k.token.txt")) == CAPTIONS
    (tmp_path / "windows.txt").write_bytes((tmp_path / "Flickr8k.token.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert read_captions(tmp_path / "windows.txt") == CAPTIONS


def test_a_split_chooses_pictures_and_a_missing_one_is_skipped(tmp_path):
    pictures(tmp_path / "Images", ["1000_a.jpg", "2000_b.jpg"])
    captions = kaggle(tmp_path / "captions.txt")
    (tmp_path / "test.txt").write_text("3000_c.jpg\n1000_a.jpg\n9000_x.jpg\n")
    source = CaptionedImages(tmp_path / "Images", captions, 16, tmp_path / "test.txt")
    skipped = []
    (batch,) = read_in_order(source, 10, 10, skipped)
    assert batch.names == ["1000_a.jpg"] and batch.images.shape == (1, 3, 16, 16) and batch.captions == ["a red star"]
    assert len(skipped) == 1 and "3000_c.jpg: no such file" in skipped[0]
    (tmp_path / "empty.txt").write_text("nothing\n")
    for arguments, words in (
        ((tmp_path / "nowhere", captions), "no such folder"),
        (
            (tmp_path / "Images", tmp_path / "nowhere.txt"),
            r"nowhere.txt: no such file; give captions.txt .*kaggle",
        ),
        ((tmp_path / "Images", tmp_path / "empty.txt"), "no caption in it"),
        ((tmp_path / "Images", captions, tmp_path / "empty.txt"), "none of its 1 names"),
        ((tmp_path / "Images", captions, tmp_path / "nowhere.txt"), "Flickr_8k.testImages.txt"),
    ):
        with pytest.raises(UserError, match=words):
            CaptionedImages(*arguments[:2], 16, *arguments[2:])


def test_any_of_five_captions_makes_a_picture_right():
    rng = np.random.default_rng(0)
    images = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(3, 8)), dtype=torch.float), dim=-1)
    texts = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(15, 8)), dtype=torch.float), dim=-1)
    texts[3], texts[14] = images[0], images[2]  # one of five is enough, wherever it stands
    texts[7] = images[0]
    found = retrieval(images, texts, list(CAPTIONS.values()))
    scores = (texts @ images.t()).numpy()
    of_text = np.repeat(np.arange(3), 5)
    assert found[0] == pytest.approx(np.mean(scores.argmax(1) == of_text))
    nearest = of_text[scores.argmax(0)]
    assert found[1] == pytest.approx(np.mean(nearest == np.arange(3))) and nearest[2] == 2


def test_retrieval_on_flickr8k_as_a_command(clip, tmp_path, capsys):
    name, tokenizer, _ = clip
    pictures(tmp_path / "Images", CAPTIONS)
    (tmp_path / "test.txt").write_text("1000_a.jpg\n2000_b.jpg\n")
    options = ["--model", tokenizer, "--encoder", name, "--data", str(tmp_path / "Images")]
    with_captions = [
        *options,
        "--captions",
        str(kaggle(tmp_path / "captions.txt")),
        "--output",
        str(tmp_path / "r.json"),
    ]
    assert main(["eval", "retrieval", *with_captions]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["images"], found["captions"]) == (3, 15)
    assert main(["eval", "retrieval", *with_captions, "--split_file", str(tmp_path / "test.txt")]) == 0
    assert "among 2 pictures and 10 captions" in capsys.readouterr().out
    assert main(["eval", "retrieval", *options]) == 2
    assert "or give --captions" in capsys.readouterr().err
    assert main(["eval", "retrieval", *options, "--split_file", str(tmp_path / "test.txt")]) == 2
    assert "--captions" in capsys.readouterr().err


def test_training_starts_from_a_file_of_open_clip(clip, tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny.recipe(phases=[{"steps": 2}], backbone={"pixel_layer": 1})))
    options = ["--config", str(tmp_path / "r.yaml"), "--encoder", clip[0], "--output", str(tmp_path / "run")]
    assert main(["train-tokenizer", *options]) == 0
    written = json.loads((tmp_path / "run/model/config.json").read_text())["backbone"]
    start = asdict(load_backbone(clip[0], BackboneConfig("", pixel_layer=1))[0])
    assert written == json.loads(json.dumps(start)) and written["projection"] == 24
