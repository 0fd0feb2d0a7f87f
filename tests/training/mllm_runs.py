"""Runs of `train-mllm` of a few steps: how they are started, and what they leave."""

import json

import torch
import yaml
from safetensors.torch import load_file

from tests import tiny

NAMES = ("1", "2", "3", "4-1", "4-2")


def write(folder, start=None, *options, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.mllm_recipe(**changes)))
    first = [] if start is None else ["--start", str(start)]
    return ["train-mllm", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *first, *options]


def recipe(name="1", **changes):
    """A recipe of one stage, with changes of it."""
    return {name: tiny.mllm_recipe()["recipe"][name] | changes}


def log(folder, stage):
    return [json.loads(line) for line in (folder / f"run/stage-{stage}/log.jsonl").read_text().splitlines()]


def weights(directory):
    return load_file(directory / "model.safetensors")


def model_of(folder, stage):
    return folder / f"run/stage-{stage}/model"


def differing(one, two):
    """Names of the tensors that are not equal."""
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


def error(capsys):
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def evaluated():
    """Options of a loop that evaluates."""
    return tiny.mllm_recipe()["loop"] | {"eval_every": 4}
