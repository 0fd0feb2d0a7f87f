"""`train-mllm` on datasets in place of the scenes: pictures are encoded as they come, and a run goes on exactly."""

import json
import tarfile

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dualtoken.cli import main
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import Picture
from dualtoken.data.collate import ChatTokens, pack
from dualtoken.data.sources import SourceConfig
from dualtoken.training.stored_codes import encode_pictures
from dualtoken.training.streamed import name_sources, open_stream, with_codes
from tests import tiny

STEPS = 6


@pytest.fixture(scope="module")
def start():
    return tiny.mllm_directory()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten captioned pictures, one of them damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        Image.new("RGB", (tiny.SIZE, tiny.SIZE), (25 * i, 255 - 25 * i, 128)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red circle and {i} stars")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:40])
    return folder


def recipe(pictures, mixture=None, **data):
    """One stage of everything, on pictures to look at and pictures to draw."""
    source = {"format": "folder", "path": str(pictures), "parts": 3}
    sources = [
        source | {"name": "looked", "weight": 2.0},
        source | {"name": "drawn", "weight": 1.0, "task": "text_to_image"},
    ]
    content = tiny.mllm_recipe()
    stage = content["recipe"]["4-1"] | {"steps": STEPS, "mixture": mixture or {"caption": 1.0}}
    return content | {
        "recipe": {"4-1": stage},
        "data": {"sources": sources, "length": 96, "window": 2, "held_out": 1, **data},
    }


def train(folder, start, content, *options):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ["train-mllm", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run")]
    return main([*command, "--start", str(start), *options])


def log(folder):
    lines = (folder / "run/stage-4-1/log.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def weights(folder):
    return load_file(folder / "run/stage-4-1/model/model.safetensors")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_datasets_goes_on_to_the_bit(workers, tmp_path, start, pictures, cut, monkeypatch, capsys):
    content = recipe(pictures, workers=workers)
    assert train(tmp_path / "whole", start, content) == 0
    cut()
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", start, content)
    monkeypatch.undo()
    assert train(tmp_path / "cut", start, content) == 0
    assert "going on from step 2" in capsys.readouterr().out
    whole, again = log(tmp_path / "whole"), log(tmp_path / "cut")
    counted = ("seen_looked", "seen_drawn", "skipped_looked", "skipped_drawn")
    assert list(whole) == list(again) == list(range(1, STEPS + 1))
    for step, line in whole.items():
        assert again[step]["loss"] == line["loss"] and line["pixel"] >= 0
        assert [again[step].get(name) for name in counted] == [line.get(name) for name in counted]
    assert whole[STEPS]["seen_looked"] + whole[STEPS]["seen_drawn"] == STEPS * 4
    assert whole[STEPS]["useful"] > 0.5 and not any("eval" in name for line in whole.values() for name in line)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = {name.split(".")[0] for name, value in load_file(start / "model.safetensors").items()
               if not torch.equal(value, one[name])}  # fmt: skip
    assert changed == {"projector", "llm", "pixel_head", "semantic_head"}


def test_a_run_may_go_on_with_other_workers_and_says_what_is_repeated(
    tmp_path, start, pictures, cut, monkeypatch, capsys
):
    cut()
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, start, recipe(pictures, workers=2))
    monkeypatch.undo()
    assert train(tmp_path, start, recipe(pictures, workers=1)) == 0
    assert "chats: 2 readers (1 processes) before, 1 now: " in capsys.readouterr().out
    assert log(tmp_path)[STEPS]["seen_looked"] + log(tmp_path)[STEPS]["seen_drawn"] == STEPS * 4
    assert train(tmp_path / "other", start, recipe(pictures, {"nothing": 1.0, "drawn": 1.0})) == 2
    assert "no source nothing; there are looked, drawn" in capsys.readouterr().err


def test_a_stage_may_weigh_sources_by_name(pictures):
    source = {"format": "folder", "path": str(pictures)}
    configs = [SourceConfig(**source | changes) for changes in (
        {"name": "a", "weight": 3.0}, {"task": "text_to_image"}, {"name": "a", "task": "text_to_image"},
    )]  # fmt: skip
    names = ["a", str(pictures), "a 2"]
    assert list(name_sources(configs)) == names
    options = {"encode": None, "batch_size": 1, "length": 9, "fill": 0, "seed": 0}
    assert open_stream(configs, {"caption": 1.0}, 16, **options).share.tolist() == [0.6, 0.2, 0.2]
    assert open_stream(configs, {"a 2": 1.0, names[1]: 3.0}, 16, **options).share.tolist() == [0.0, 0.75, 0.25]
    with pytest.raises(UserError, match="no source vqa; there are a, "):
        open_stream(configs, {"a": 1.0, "vqa": 1.0}, 16, **options)


def test_pixels_of_a_batch_become_the_codes_of_their_pictures():
    tokenizer = tiny.tokenizer()
    images = (tiny.images(3) * 127 + 128).to(torch.uint8)
    images[1, :, :, :8] = images[0, :, :, :8]  # an edit that leaves the left half alone
    before = Picture("before", image=images[0])
    after = Picture("after", image=images[1], edited=before)
    alone = Picture("alone", image=images[2])
    known = DualCodes(torch.full((1, 4, 2), 7), torch.full((1, 4, 2), 8))
    shown = [before, after, Picture("known", codes=known), alone]
    ids = torch.arange(4)
    batch = pack([ChatTokens(ids, ids, None, torch.ones(4, dtype=torch.bool), shown)], 4, 0)
    made = with_codes(tokenizer, batch)
    wanted = encode_pictures(tokenizer, [before, after, alone])
    assert made.unseen is None and torch.equal(made.input_ids, batch.input_ids)
    for name in ("pixel", "semantic"):
        found, of_known = getattr(made.codes, name), getattr(known, name)
        assert torch.equal(found[[0, 1, 3]], getattr(wanted, name)) and torch.equal(found[2:3], of_known)
        assert torch.equal(found[1, [0, 2]], found[0, [0, 2]])  # what the edit leaves alone keeps its codes
    assert with_codes(tokenizer, made) is made


def test_stored_codes_are_trained_on_without_a_vision_tower(tmp_path, start, pictures, watched):
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for file in sorted(pictures.iterdir()):
            tar.add(file, file.name)
    model = str(tiny.tokenizer_directory())
    assert main(["encode", str(tmp_path / "000.tar"), "--output", str(tmp_path / "codes"), "--model", model]) == 0
    shards = {"format": "codes", "path": str(tmp_path / "codes")}
    chosen = json.dumps([shards | {"task": task} for task in ("caption", "text_to_image")])
    stages = {name: tiny.mllm_recipe()["recipe"][name] | {"steps": 2} for name in ("4-1", "4-2")}
    content = tiny.mllm_recipe(recipe=stages)
    assert train(tmp_path / "run", start, content, "--data.sources", chosen) == 0  # as docs/own-pictures.md has it
    assert watched["towers"] == {None} and watched["steps"] == 4
    assert len(torch.cat([batch.codes.pixel for batch in watched["batches"]]).unique(dim=0)) > 3
