"""`dualtoken plan`."""

import json

import pytest
import yaml

from dualtoken.app.plan import plan
from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.training.stages import STAGES
from tests import tiny


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny.mllm_recipe() | changes))
        return str(path)

    return write


def test_a_small_recipe_as_table_and_numbers(recipe, tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert main(["plan", recipe(), "--images", "2k", "--shard_size", "100", "--output", str(output)]) == 0
    said, found = capsys.readouterr().out, json.loads(output.read_text())
    assert "chats at once" in said and "every picture once" in said
    assert found["data"]["bytes_a_picture"] == 2 * 2 * 4 * 2 and found["data"]["shards"] == 20
    for name, stage in found["stages"].items():
        parts = ("weights", "gradients", "moments", "activations")
        assert stage["total"] == sum(stage[part] for part in parts) and stage["logits"] > 0, name
        assert stage["steps"] == tiny.mllm_recipe()["recipe"][name]["steps"]


def test_tokens_steps_and_hours_follow_from_the_recipe(recipe):
    half = {"trains": {"llm": 1e-3}, "batch_size": 8, "mixture": {"caption": 1.0, "text": 1.0}, "steps": 10}
    path = recipe(recipe={"one": half})
    (found,) = plan(path, text=100, images="400", tflops=1e-6)["stages"].values()
    assert found["pictures_a_step"] == 4 and found["tokens_a_step"] == 8 * 100 + 4 * 6
    assert found["hours"] == pytest.approx(found["operations"] / 1e6 / 3600)
    two = plan(path, devices=2, text=100, images="400")
    assert two["stages"]["one"]["samples_at_once"] == 4 and two["data"]["steps_to_see_all"] == {"one": 100}
    assert two["stages"]["one"]["gradients"] == 2 * found["gradients"]


def test_the_papers_recipe_by_its_name():
    found = plan("qwen2.5-3b", devices=64, stage="3", images="60M", shard=True)
    (stage,) = found["stages"].values()
    assert stage["samples_at_once"] * stage["accumulate"] * 64 == STAGES["3"].batch_size
    assert found["data"] | {"steps_to_see_all": None, "readers": None} == {
        "images": 60_000_000, "bytes_a_picture": 4096, "bytes_in_tar": 5632, "shards": 6000, "readers": None,
        "steps_to_see_all": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nowhere", {}, "RECIPE nowhere: no such file or recipe"),
        ("siglip-l-256", {}, "no recipe of train-mllm"),
        ("qwen2.5-3b", {"devices": 0}, "--devices 0: give a number above 0"),
        ("qwen2.5-3b", {"devices": 48}, "stage 1: a batch of 64 cannot be split over 48 devices"),
        ("qwen2.5-3b", {"stage": "9"}, "--stage 9: unknown"),
        ("qwen2.5-3b", {"shape": "paper-1b"}, "--shape paper-1b: unknown; the shapes are paper-3b"),
        ("qwen2.5-3b", {"images": "many", "stage": "1"}, "--images many: give a number above 0"),
    ],
)
def test_mistakes_name_the_option(name, options, words):
    with pytest.raises(UserError, match=words):
        plan(name, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "no YAML"),
        ("vision_tokenizer: mini\nrecipe: {'1': {trains: {projektor: 1.0}, batch_size: 8, mixture: {}}}", "projektor;"),
        ("vision_tokenizer: mini\ndata: {sources: [x]}", "data.sources is no list of sources"),
        ("vision_tokenizer: mini\nrecipe: {'1': {batch: 8}}", "its stages .* cannot be read: .*'batch'"),
    ],
)
def test_mistakes_in_a_recipe_are_named(text, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        plan(str(tmp_path / "recipe.yaml"))


def test_recipes_that_read_pictures_hold_the_vision_tower(recipe):
    weights = {}
    for kind in ("codes", "folder"):
        data = tiny.mllm_recipe()["data"] | {"sources": [{"format": kind, "path": "x"}]}
        weights[kind] = plan(recipe(data=data))["stages"]["1"]["weights"]
    tower = tiny.tokenizer()
    held = [part for branch in (tower.pixel, tower.semantic) for part in (branch.quantizer, branch.post)]
    size = [sum(p.numel() for module in modules for p in module.parameters()) for modules in ([tower], held)]
    assert weights["folder"] - weights["codes"] == 4 * (size[0] - size[1]) > 0


def test_an_llm_that_is_not_here_needs_a_shape(recipe):
    with pytest.raises(UserError, match="llm some/llm: no such directory; give its sizes as --shape"):
        plan(recipe(llm="some/llm"))
    assert plan(recipe(llm="some/llm"), shape="gpu-0.5b", stage="1")["stages"]
