import threading
import time
from concurrent.futures import CancelledError

import pytest

from dualtoken.app.batching import BatchConfig, Batcher, Job, Left, QueueFull, check_awaited
from dualtoken.core.errors import UserError

SECONDS = 20  # longer than any of it takes


class Model:
    """Notes every batch; its first one waits until `go` is set."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Event(), threading.Event()

    def __call__(self, jobs):
        self.batches.append([job.payload for job in jobs])
        self.begun.set()
        while not self.go.wait(0.01):
            check_awaited(jobs)
        if any(job.payload == "bad" for job in jobs):
            raise UserError("bad row")
        return [(job.kind, job.payload) for job in jobs]


@pytest.fixture
def model():
    return Model()


def batcher(model, **changes):
    made = Batcher(model, BatchConfig(**{"max_batch": 3, "max_wait_ms": 0, "max_queue": 6} | changes))
    made.start()
    return made


def jobs(*payloads, kind="draw", settings=1, **options):
    return [Job(kind, settings, payload, **options) for payload in payloads]


def busy(made, model):
    """The model at work on one row, so that others wait."""
    (first,) = jobs("first")
    made.submit([first])
    assert model.begun.wait(SECONDS)
    return first


def test_rows_of_a_kind_run_together_in_order_of_arrival(model):
    made = batcher(model)
    busy(made, model)
    waiting = [*jobs(1, 2), *jobs("other", settings=2), *jobs("single", alone=True), *jobs(3, 4), *jobs("e", kind="e")]
    with pytest.raises(QueueFull):
        made.submit(waiting)  # seven rows, and room for six: none of them is taken
    made.submit(waiting[:6])
    model.go.set()
    assert [job.done.result(SECONDS)[1] for job in waiting[:6]] == [1, 2, "other", "single", 3, 4]
    assert model.batches == [["first"], [1, 2, 3], ["other"], ["single"], [4]]
    made.close()


def test_an_idle_model_waits_for_others_but_not_for_long(model):
    model.go.set()
    made = batcher(model, max_wait_ms=400)
    one, two = jobs(1, 2)
    made.submit([one])
    time.sleep(0.05)
    made.submit([two])
    assert two.done.result(SECONDS) and model.batches == [[1, 2]]
    started = time.monotonic()
    made.submit(jobs(3, 4, 5))  # a full batch does not wait
    (last,) = jobs(6, kind="e")
    made.submit([last])
    last.done.result(SECONDS)
    assert time.monotonic() - started > 0.39 and model.batches[1:] == [[3, 4, 5], [6]]
    made.close()


def test_who_leaves_is_not_served_and_makes_room(model):
    made = batcher(model)
    first = busy(made, model)
    waiting = jobs(*range(6))
    made.submit(waiting)
    with pytest.raises(QueueFull) as full:
        made.submit(jobs("more"))
    assert full.value.retry_after >= 1
    for job in waiting[:3]:
        job.leave()
    made.submit(jobs("a", "b"))
    first.leave()  # the model notices, and goes on with the next rows
    time.sleep(0.1)
    model.go.set()
    assert waiting[5].done.result(SECONDS)
    with pytest.raises(Left):
        first.done.result(SECONDS)
    made.close()
    assert [row for batch in model.batches for row in batch] == ["first", 3, 4, 5, "a", "b"]


def test_a_bad_row_harms_no_other(model):
    made = batcher(model)
    busy(made, model)
    good, bad, fine = jobs(1, "bad", 2)
    made.submit([good, bad, fine])
    model.go.set()
    assert good.done.result(SECONDS)[1] == 1 and fine.done.result(SECONDS)[1] == 2
    with pytest.raises(UserError, match="bad row"):
        bad.done.result(SECONDS)
    assert made.alive
    made.close()
    assert not made.alive
    with pytest.raises(QueueFull):
        made.submit(jobs(9))


def test_closing_lets_go_of_what_waits(model):
    made = batcher(model)
    first = busy(made, model)
    (waiting,) = jobs("w")
    made.submit([waiting])
    closing = threading.Thread(target=made.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.done.result(SECONDS)
    model.go.set()  # what runs is waited for
    closing.join(SECONDS)
    assert first.done.result(SECONDS) and not closing.is_alive()


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_ms": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        BatchConfig(**wrong)
