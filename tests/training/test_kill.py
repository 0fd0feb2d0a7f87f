"""Training that is killed, stopped, or runs out of disk loses nothing that was saved."""

import errno
import json
import os
import random
import resource
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dualtoken.cli import main
from dualtoken.core import checkpoint
from dualtoken.core.checkpoint import latest_state, save_state
from dualtoken.training import loop
from tests import tiny
from tests.training.processes import die_writing, run, start

STEPS, KILLS = 120, 20


def call(folder, steps=STEPS, **changes):
    """A short training of the tokenizer, which saves after every step."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"save_every": 1, "keep": 2, "eval_every": 0, "log_every": 1, "tracker": "none"} | changes
    content = tiny.recipe(phases=[{"steps": steps}], losses={"adversarial": 0.0}, loop=settings)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["train-tokenizer", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run")]


def saved(folder):
    """Step of the newest state that is whole."""
    found = latest_state(folder / "run/states")
    return 0 if found is None else found[1]["step"]


def same(one, two):
    first, second = (load_file(folder / "run/model/model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    assert run([], tmp_path) == []  # so that what is timed is not the server's start
    began = time.time()
    assert run([call(tmp_path / "whole")], tmp_path / "whole") == [0]
    lasted = time.time() - began
    rng, reached = random.Random(0), 0
    folder = tmp_path / "killed"
    for number in range(KILLS):
        writing = number % 2 == 1  # every other time while a state is being written
        (process,) = start([call(folder)], folder, disturb=(die_writing, rng.randrange(8 * 3)) if writing else None)
        while not writing and process.is_alive() and saved(folder) == reached:
            time.sleep(0.01)
        process.join(60 if writing else rng.uniform(0, 4) * lasted / STEPS)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert saved(folder) >= reached, "a state that was whole is gone"
        reached = saved(folder)
    assert KILLS // 2 <= reached < STEPS
    assert run([call(folder)], folder) == [0]
    assert same(folder, tmp_path / "whole")
    ours, theirs = (_losses(place) for place in (folder, tmp_path / "whole"))
    assert ours == theirs


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_tried_again(tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.save_file, []

    def sometimes(tensors, path):
        calls.append(path)
        if 2 <= len(calls) <= 3:
            path.write_bytes(b"half a file")
            full()
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", sometimes)
    saved = []
    monkeypatch.setattr(loop, "save_state", lambda *args: saved.append(save_state(*args)) or saved[-1])
    assert main(call(tmp_path, steps=4)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run/states"
    assert [p.name for p in saved] == ["step-00000001", "step-00000004"]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000004"]
    for step in (2, 3):
        assert f"warning: the state after step {step} was not written (No space left on device)" in out
    assert f"a stop now loses what came after {folder / 'step-00000001'}; free space" in out
    assert "--loop.save_every 1" in out


def test_a_model_that_does_not_fit_is_a_mistake_that_names_what_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr("dualtoken.training.tokenizer.write_model", full)
    assert main(call(tmp_path, steps=2)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    place = tmp_path / "run/model"
    assert message.startswith(f"error: {place} was not written (No space left on device); free space")
    assert message.endswith("from the start, and what came after it is lost")
    assert not place.exists() and list((tmp_path / "run/states").iterdir()) == []
    monkeypatch.undo()
    assert main(call(tmp_path, steps=2)) == 0 and place.is_dir()


def test_a_log_on_a_full_disk_is_left_out(tmp_path, capsys):
    run_ = loop.Loop(str(tmp_path), 4, 0, "auto", loop.LoopConfig(tracker="none"), {})
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run_.record({"step": 1})
    assert "warning: a line of log.jsonl could not be written (No space left on device)" in capsys.readouterr().out


def test_where_a_file_cannot_grow_the_state_before_stays_and_the_draft_goes(tmp_path):
    save_state(tmp_path, 1, {"x": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path, 2, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_state(tmp_path)[1]["x"].sum() == 10


def test_sigterm_finishes_the_step_saves_and_says_where(tmp_path, monkeypatch, capsys):
    record = loop.Loop.log

    def log(self, step, *args):
        record(self, step, *args)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Loop, "log", log)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(call(tmp_path, steps=4, save_every=100))
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    place = tmp_path / "run/states/step-00000002"
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"stopped by SIGTERM after step 2; saved in {place}; the same command goes on from there"
    assert [p.name for p in place.parent.iterdir()] == [place.name] and not (tmp_path / "run/model").exists()
    assert main(call(tmp_path, steps=4, save_every=100)) == 0  # step number 1 does not come again


def test_sigterm_on_a_full_disk_says_what_is_lost(tmp_path, monkeypatch, capsys):
    record = loop.Loop.log

    def log(self, step, *args):
        record(self, step, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Loop, "log", log)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit) as stop:
        main(call(tmp_path, steps=4))
    assert stop.value.code == 143
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("not saved (No space left on device): what came after the start is lost")


def test_damaged_later_states_do_not_crowd_out_whole_ones(tmp_path):
    for step in (1, 2, 9):
        save_state(tmp_path, step, {"x": torch.ones(1)}, keep=3)
    (tmp_path / "step-00000009/state.json").unlink()
    assert latest_state(tmp_path)[0].name == "step-00000002"
    save_state(tmp_path, 3, {"x": torch.ones(1)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
