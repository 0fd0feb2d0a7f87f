import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dualtoken.cli import main
from dualtoken.core.checkpoint import latest_state
from dualtoken.data.images import DataConfig, StepBatches, open_source
from dualtoken.data.tar_shards import add_file
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.training.loop import Loop, LoopConfig
from dualtoken.training.optim import OptimConfig
from dualtoken.training.tokenizer import set_trained
from tests import tiny
from tests.data.test_images import write_shard
from tests.tokenizer.test_joined import joined


def write(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**changes)))
    return ["train-tokenizer", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run")]


def log(folder):
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(write(folder, ema=0.9)) == 0
    return folder


def test_a_run_writes_model_log_states_and_samples(finished):
    run = finished / "run"
    assert open_tokenizer(str(run / "model")).image_size == 16
    assert {p.name for p in (run / "samples").iterdir()} == {"step-00000004.png", "step-00000008.png"}
    assert {p.name for p in (run / "states").iterdir()} == {"step-00000006", "step-00000008"}
    lines = log(finished)
    parts = {"mse", "teacher_perceptual", "features", "pooled", "pixel_commitment", "discriminator", "adversarial"}
    assert parts <= set(lines[-2]) and "adversarial" not in lines[0]
    assert [line["step"] for line in lines if "mse" in line] == list(range(1, 9))
    assert {
        f"{name}_{what}_{depth}"
        for name in ("pixel", "semantic")
        for what in ("usage", "perplexity")
        for depth in (1, 2)
    } <= set(lines[0])
    assert {"eval_psnr", "eval_ssim", "eval_teacher_frechet"} <= set(lines[-1])


def same_weights(first, second):
    one, two = (load_file(f / "run/model/model.safetensors") for f in (first, second))
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])] == []


def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path, finished):
    command = [sys.executable, "-c", "import sys; from dualtoken.cli import main; sys.exit(main(sys.argv[1:]))"]
    process = subprocess.Popen(
        [*command, *write(tmp_path, ema=0.9)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    deadline = time.time() + 300
    while time.time() < deadline and latest_state(tmp_path / "run/states") is None and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "run/model").exists()
    assert main(write(tmp_path, ema=0.9)) == 0
    assert same_weights(tmp_path, finished)
    ours, theirs = ({x["step"]: x["loss"] for x in log(f) if "loss" in x} for f in (tmp_path, finished))
    assert ours == theirs


def test_ema_weights_are_what_is_written(tmp_path, finished):
    assert main(write(tmp_path)) == 0
    assert not same_weights(tmp_path, finished)


def test_first_phase_trains_exactly_its_parts(tmp_path):
    phases = [{"steps": 2, "trains": ["pixel.post", "decoder"]}]
    assert main(write(tmp_path, phases=phases, losses={"adversarial": 0.0})) == 0
    # two runs from one seed differ only in what learns
    still = tmp_path / "still"
    assert main(write(still, phases=[{"steps": 2, "trains": ["decoder.conv_out"]}], losses={"adversarial": 0.0})) == 0
    one, two = (load_file(f / "run/model/model.safetensors") for f in (tmp_path, still))
    changed = {name.split(".")[0] + "." + name.split(".")[1] for name in one if not torch.equal(one[name], two[name])}
    assert changed and {c for c in changed if not c.startswith("decoder.")} == {"pixel.post"}
    assert not any("backbone" in c or "semantic" in c for c in changed)


def test_codebooks_of_branches_that_do_not_learn_stand_still():
    model = tiny.tokenizer()
    set_trained(model, ("pixel", "decoder"))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(tiny.images())
    moved = {n.split(".")[0] for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {"pixel"}
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"pixel", "decoder"}


@pytest.mark.parametrize("trains", [["pixel.quantizer", "semantic.quantizer"], ["semantic"]])
def test_phases_without_the_decoder_run(trains, tmp_path):
    phases = [{"steps": 2, "trains": trains}, {"steps": 2}]
    judged = {"losses": {"adversarial": 0.75}, "discriminator": tiny.recipe()["discriminator"] | {"start": 0}}
    assert main(write(tmp_path, phases=phases, **judged)) == 0


@pytest.mark.parametrize("trains", [("pixel",), ("semantic",), ("pixel", "semantic")])
def test_one_codebook_for_both_learns_by_either_name(trains):
    model = joined()
    set_trained(model, trains)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(tiny.images())
    assert any(not torch.equal(b, before[n]) for n, b in model.named_buffers() if "codebook" in n)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"pixel"}


def test_a_run_goes_on_with_other_loading_processes_and_another_evaluation(tmp_path):
    assert main(write(tmp_path)) == 0
    options = ["--data.workers", "1", "--evaluation.images", "8", "--dtype", "float16"]
    assert main([*write(tmp_path), *options]) == 0


def test_accumulated_batches_learn_and_other_settings_refuse_to_resume(tmp_path, capsys):
    loop = tiny.recipe()["loop"] | {"accumulate": 2}
    assert main(write(tmp_path, loop=loop)) == 0
    assert main([*write(tmp_path, loop=loop), "--optim.lr", "0.5"]) == 2
    assert "has another optim" in capsys.readouterr().err
    assert main([*write(tmp_path, loop=loop), "--resume", "never"]) == 2
    assert "--resume auto" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_shards_that_are_cut_off_and_pictures_that_are_damaged_are_counted(precision, request, tmp_path, capsys):
    """In every accumulated batch of a step."""
    write_shard(tmp_path / "whole.tar", ["a", "b", "c"])
    write_shard(tmp_path / "cut.tar", ["d", "e", "f"], cut=10_000)  # inside the second picture
    (tmp_path / "more").mkdir()
    with tarfile.open(tmp_path / "more/bad.tar", "w") as tar:
        add_file(tar, "g.png", b"no picture")
    AcceleratorState._reset_state()  # it takes one precision for all of a process
    request.addfinalizer(AcceleratorState._reset_state)
    loop = tiny.recipe()["loop"] | {"accumulate": 2, "precision": precision}
    data = tiny.recipe()["data"] | {"source": str(tmp_path)}
    assert main(write(tmp_path, loop=loop, data=data)) == 0
    said, (last,) = capsys.readouterr().out, log(tmp_path)[-2:-1]
    assert "skipped: " + str(tmp_path / "cut.tar") + ": cut off or damaged" in said
    steps = range(sum(phase["steps"] for phase in tiny.recipe()["phases"]) * 2)
    batches = StepBatches(open_source(DataConfig(str(tmp_path)), 16), data["batch_size"], 0)
    bad = sum(len(batches[step].skipped) for step in steps)
    assert sum(last["skipped"].values()) == bad + 1 and bad > len(steps) / 2


def test_not_a_number_stops_with_step_part_and_last_good_state(tmp_path, capsys):
    assert main(write(tmp_path, optim={"lr": 1e30, "warmup": 0, "clip": 0.0})) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training stopped at step" in message and "not finite" in message and "last good state" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": {"channels": 8, "multipliers": [1, 1], "blocks": 1}}, "decoder gives 4 px, the backbone takes 16"),
        ({"phases": [{"steps": 1, "trains": ["codebooks"]}]}, "the parts are backbone, pixel"),
        ({"phases": [{"steps": 1, "trains": ["pixel", "pixel.quantiser"]}]}, "trains ['pixel.quantiser']; the parts"),
        ({"data": {"source": "nowhere/"}}, "--data.source nowhere: no such file or folder"),
        ({"evaluation": {"source": "nowhere/"}}, "--evaluation.source nowhere: no such file or folder"),
        ({"losses": {"perceptual": 1.0, "lpips_weights": "nowhere"}}, "--losses.lpips_weights nowhere: no such file"),
        ({"encoder": "nowhere"}, "--encoder nowhere: no such directory"),
        ({"optimm": {"lr": 1}}, "unknown key 'optimm.lr'; the nearest valid key is 'optim.lr'"),
        ({"losses": {"adversrial": 0.0}}, "nearest valid key is 'losses.adversarial'"),
        ({"backbone": {"name": "vit_base_patch16_siglp_256"}}, "is not a timm model"),
    ],
)
def test_mistakes_are_one_line_with_status_2(tmp_path, capsys, changes, words):
    assert main(write(tmp_path, **changes)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_learning_rate_warms_up_and_decays():
    optim = OptimConfig(lr=1.0, warmup=10, final=0.1)
    rates = [optim.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_weight_decay_is_on_matrices_only():
    groups = OptimConfig(weight_decay=0.3).build(list(tiny.tokenizer().parameters())).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])


def test_random_state_of_a_step_depends_on_its_number_alone(tmp_path):
    def draws(start):
        loop = Loop(str(tmp_path), 4, 0, "auto", LoopConfig(tracker="none"), {})
        loop.start = start
        return {step: float(torch.rand(())) for step in loop.run()}

    whole = draws(0)
    assert len(set(whole.values())) == 4 and draws(2) == {2: whole[2], 3: whole[3]}
