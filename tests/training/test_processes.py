"""Many processes learn what one learns, and go on from each other's states."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dualtoken.core.checkpoint import load_state
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.training.health import Pace
from tests import tiny
from tests.training.processes import run, terminate

STAGES = ("1", "2", "3", "4-1", "4-2")
HALF = 2  # steps before a stop, of 4
SIZE = 32  # px of the tokenizer's pictures


def tokenizer_call(folder):
    """Two steps of codebooks and decoder, two of everything, a discriminator, and an average of the weights.

    On 16 positions of noise: of four in one colour all may get one code, and the group norms of a decoder this narrow
    (one channel each) then divide by nothing but their eps, twice: gradients of 1e5, and rounding a million times over.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(16):
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        noise.resize((SIZE, SIZE)).save(pictures / f"{number}.png")
    content = tiny.recipe(
        data={"source": str(pictures), "batch_size": 4},
        backbone={"name": tiny.BACKBONE.name, "overrides": tiny.OVERRIDES | {"img_size": SIZE}, "pixel_layer": 1},
        ema=0.9, phases=[{"steps": 2, "trains": ["pixel", "semantic", "decoder"]}, {"steps": 2}],
        discriminator={"channels": 8, "layers": 2, "start": 1}, evaluation={"images": 4},
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["train-tokenizer", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run")]


def mllm_call(folder, start, *options, stages=STAGES, **changes):
    """Stages of four steps, of four samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tiny.mllm_recipe(**changes)
    content["recipe"] = {name: content["recipe"][name] for name in stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    call = ["train-mllm", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run")]
    return [*call, "--start", str(start), "--data.codes", str(folder.parent / "codes"), *options]


@pytest.fixture(scope="module")
def one(tmp_path_factory, start):
    """What one process learns."""
    folder = tmp_path_factory.mktemp("one")
    calls = [tokenizer_call(folder / "tokenizer"), mllm_call(folder / "mllm", start)]
    assert run(calls, folder) == [0, 0]
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pace = Pace(1, 1).look(1)
    return {line["step"]: {k: v for k, v in line.items() if k not in pace} for line in lines if "loss" in line}


def same(one, two):
    """Equal weights and logged losses, parts of them and norms, within 1e-5."""
    first, second = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    far = {name: float((first[name] - second[name]).abs().max()) for name in first}
    assert {name: distance for name, distance in far.items() if distance > 1e-5} == {}
    ours, theirs = losses(one), losses(two)
    assert ours.keys() == theirs.keys()
    for step, line in ours.items():
        assert line.keys() == theirs[step].keys()
        for name, value in line.items():
            if name != "useful":  # how rows are filled is the business of each process
                assert theirs[step][name] == pytest.approx(value, abs=1e-5, rel=1e-5), (step, name)


def test_two_processes_learn_what_one_learns(tmp_path, start, one):
    # batches of one sample: some have nothing to draw, some nothing to say, and each its own number of tokens
    loop = tiny.mllm_recipe()["loop"] | {"accumulate": 2}
    calls = [tokenizer_call(tmp_path / "tokenizer"), mllm_call(tmp_path / "mllm", start, loop=loop)]
    assert run(calls, tmp_path, 2) == [0, 0]
    same(one / "tokenizer/run", tmp_path / "tokenizer/run")
    for stage in STAGES:
        same(one / f"mllm/run/stage-{stage}", tmp_path / f"mllm/run/stage-{stage}")


def test_weights_and_moments_split_over_two_processes_learn_the_same(tmp_path, start, one):
    loop = tiny.mllm_recipe()["loop"] | {"shard": True, "eval_every": 4, "gradient_checkpointing": True}
    assert run([mllm_call(tmp_path / "mllm", start, loop=loop)], tmp_path, 2) == [0]
    for stage in STAGES:
        same(one / f"mllm/run/stage-{stage}", tmp_path / f"mllm/run/stage-{stage}")
    place = tmp_path / "mllm/run/stage-4-2"
    DualTokenForConditionalGeneration.from_pretrained(place / "model")
    newest = place / "states/step-00000004"
    split, whole = (load_state(folder) for folder in (newest, one / "mllm/run/stage-4-2/states/step-00000004"))
    assert split["optimizer"]["state"].keys() == whole["optimizer"]["state"].keys()
    for number, moments in whole["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.allclose(split["optimizer"]["state"][number][name], moment, atol=1e-6)
    # each process has written its half, and nothing that is split is in the file of what is whole
    halves = [load_file(file) for file in sorted(newest.glob("shard-*"))]
    assert len(halves) == 2 and not any("exp_avg" in name for name in load_file(newest / "state.safetensors"))
    sizes = [sum(t.numel() for t in half.values()) for half in halves]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sum(sizes)


@pytest.mark.parametrize(
    ("first", "then", "shards"),
    [(2, 1, (False, False)), (1, 2, (False, False)), (2, 1, (True, False)), (1, 2, (False, True))],
    ids=["2 to 1", "1 to 2", "2 split to 1", "1 to 2 split"],
)
def test_a_run_stopped_by_sigterm_goes_on_with_another_number_of_processes(tmp_path, start, one, first, then, shards):
    def calls(shard):
        loop = tiny.mllm_recipe()["loop"] | {"save_every": 100, "shard": shard}
        last = mllm_call(tmp_path / "mllm", one / "mllm/run/stage-3/model", "--stages", "4-1", loop=loop)
        return [last] if any(shards) else [last, tokenizer_call(tmp_path / "tokenizer")]

    # the signal reaches the last process alone
    codes = run(calls(shards[0]), tmp_path, first, (terminate, first - 1, HALF - 1))
    assert codes == [143] * len(codes)
    states = tmp_path / "mllm/run/stage-4-1/states"
    assert [p.name for p in states.iterdir()] == [f"step-{HALF:08d}"]
    assert f"stopped by SIGTERM after step {HALF}; saved in {states}" in (tmp_path / "printed-0").read_text()
    assert not (tmp_path / "mllm/run/stage-4-1/model").exists()
    assert run(calls(shards[1]), tmp_path, then) == [0] * len(codes)
    same(one / "mllm/run/stage-4-1", tmp_path / "mllm/run/stage-4-1")
    if not any(shards):
        same(one / "tokenizer/run", tmp_path / "tokenizer/run")
