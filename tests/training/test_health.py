"""What a run tells of itself, and what it does when values or codebooks go bad."""

import json

import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.training.health import MOST_KINDS, MOST_SKIPPED, Pace, Skipped, collapsed
from dualtoken.training.loop import Loop, LoopConfig

NAN = {"mse": torch.tensor(1.0), "pooled": torch.tensor(float("nan"))}


@pytest.fixture
def loop(tmp_path):
    def make(**config):
        return Loop(str(tmp_path), 40, 0, "auto", LoopConfig(tracker="none", log_every=1, **config), {}, samples=8)

    return make


def test_pace_tells_steps_samples_waiting_and_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dualtoken.training.health.time.perf_counter", lambda: now[0])

    def slow():
        while True:
            now[0] += 0.5
            yield "batch"

    pace, stream = Pace(100, 16), slow()
    for _ in range(10):
        assert pace.take(stream) == "batch"
        now[0] += 1.5
    expected = {"steps_per_s": 0.5, "samples_per_s": 8.0, "waiting": 0.25, "minutes_left": 3.0}
    assert pace.look(10) == expected
    now[0] += 4
    assert pace.look(12) == {"steps_per_s": 0.5, "samples_per_s": 8.0, "waiting": 0.0, "minutes_left": 2.933}


def test_what_is_skipped_is_counted_by_kind_in_the_log(loop, tmp_path):
    run = loop()
    lines = [
        "a.jpg: damaged picture (truncated)",
        "b.jpg: 900 x 4 pixels, more than 1,000",
        "c.jpg: 20 x 9 pixels, more than 1,000",
    ]
    for step in run.run():
        run.skip(lines if step == 2 else ())
        run.log(step, {"loss": 1.0})
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "skipped" not in logged[1]
    assert logged[-1]["skipped"] == {"damaged picture": 1, "N x N pixels, more than N": 2}
    assert {"steps_per_s", "samples_per_s", "waiting", "minutes_left"} <= set(logged[0])
    skipped = Skipped()
    assert skipped.add("no reason at all") == 1
    for word in "abcdefghijklmnopqrstuvwxyz":
        for other in "abc":
            skipped.add(f"x: {word}{other}")
    assert len(skipped.kinds) == MOST_KINDS + 1 and skipped.kinds["other errors"] == 79 - MOST_KINDS


@pytest.mark.parametrize(("option", "value"), [("keep", 0), ("accumulate", 0), ("save_every", -1)])
def test_numbers_that_would_lose_a_run_are_refused(option, value):
    """Of states of which none is kept, a run would say that it goes on from them."""
    with pytest.raises(UserError, match=f"--loop.{option} {value}: give at least {value + 1}"):
        LoopConfig(**{option: value})


def test_a_part_that_is_not_finite_stops_or_skips_its_step(loop, capsys):
    with pytest.raises(UserError, match="step 3: pooled not finite; last good state: none yet"):
        loop().check(3, NAN)
    run = loop(on_nan="skip")
    assert run.check(3, {"mse": NAN["mse"]}) and not run.check(3, NAN)
    assert "step 3 changes nothing: pooled not finite" in capsys.readouterr().out
    for step in range(5, 4 + MOST_SKIPPED):
        assert not run.check(step, NAN) and not run.check(step, NAN)
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} steps in a row were skipped"):
        run.check(4 + MOST_SKIPPED, NAN)


def test_one_scaler_serves_two_optimizers_and_steps_that_are_left_out(loop):
    run = loop()
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=1.0) for w in weights]

    def step(factor, sound):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            scaler.scale(factor * weight.sum()).backward()
            scaler.unscale_(optimizer)
        run.learn(sound, *optimizers)

    step(0.5, True)
    assert all(torch.equal(w, torch.full((3,), 0.5)) for w in weights)  # the gradient, not one scaled down twice
    step(torch.inf, False)
    assert scaler.get_scale() == 512.0 and all(w.grad is None for w in weights)
    step(0.25, True)  # goes on
    assert all(torch.equal(w, torch.full((3,), 0.25)) for w in weights)


def test_collapsed_codebooks_warn_or_stop(loop, capsys):
    perplexity = {"pixel": torch.tensor([40.0, 30.0]), "semantic": torch.tensor([25.0, 1.5])}
    assert collapsed(perplexity, 1.0) == [] and collapsed(perplexity, 2.0) == ["semantic depth 2 (perplexity 1.50)"]
    loop().check_codebooks(0, perplexity)
    assert "warning: step 0: codes have collapsed: semantic depth 2" in capsys.readouterr().out
    loop(on_collapse="ignore").check_codebooks(0, perplexity)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"semantic depth 2 .*below --loop\.collapse 2"):
        loop(on_collapse="stop").check_codebooks(0, perplexity)
    loop(on_collapse="stop", collapse=1.0).check_codebooks(0, perplexity)
