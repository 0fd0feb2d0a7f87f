"""A bounded queue of rows of work, and one thread that owns the model and runs rows of one kind together.

A row is one reply or one picture. Rows wait until `max_batch` of their kind with the same settings are there, or the
oldest has waited `max_wait_ms`; while the model is busy they gather by themselves, so the wait matters only when it
idles.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from dualtoken.core.errors import UserError

log = logging.getLogger(__name__)
SLOWER = 0.8  # weight of the past in the running mean of a batch's duration


@dataclass
class BatchConfig:
    """How rows are joined.

    Args:
        max_batch: rows that run together.
        max_wait_ms: longest that a row waits for others while the model idles.
        max_queue: rows that may wait; further requests are turned away.
    """

    max_batch: int = 8
    max_wait_ms: float = 10.0
    max_queue: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_wait_ms", 0), ("max_queue", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give at least {least}")


class QueueFull(Exception):
    """No room for the rows; `retry_after` is when to try again, in whole seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} rows are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class Left(Exception):
    """Nobody waits for the batch any more."""


@dataclass(eq=False)
class Job:
    """One row: what is to be done, and who waits for it.

    Args:
        kind: of work; settings: rows join where kind and settings are equal.
        payload: what the row has of its own.
        alone: the row is never joined with others.
    """

    kind: str
    settings: Any
    payload: Any
    alone: bool = False
    done: Future = field(default_factory=Future)
    left: bool = False
    arrived: float = field(default_factory=time.monotonic)

    def leave(self) -> None:
        """Nobody waits for the row any more: it is not begun, or ends as soon as the model can end it."""
        self.left = True
        self.done.cancel()  # without effect on a row that runs

    def joins(self, other: "Job") -> bool:
        """Whether both may run together."""
        return not (self.alone or other.alone) and self.kind == other.kind and self.settings == other.settings


def check_awaited(jobs: Sequence[Job]) -> None:
    """What long work calls now and then: raises Left where nobody waits for any of its rows."""
    if all(job.left for job in jobs):
        raise Left


class Batcher:
    """The queue and its thread.

    Args:
        run: what the model does: rows of one kind with equal settings -> their results in order. What it raises
            goes to those who wait; a batch that fails is run again row by row, so that one row does not harm others.
        observe: told (kind, rows, seconds) of every batch.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], list[Any]],
        config: BatchConfig,
        observe: Callable[[str, int, float], None] = lambda kind, rows, seconds: None,
    ):
        self.run, self.config, self.observe = run, config, observe
        self.waiting: list[Job] = []
        self.seconds = 1.0  # of a batch, running mean
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dualtoken-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take nothing more, let go of what waits, and wait for the batch that runs."""
        with self._changed:
            self._closed = True
            for job in self.waiting:
                job.leave()
            self._changed.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def check_room(self, rows: int = 1) -> None:
        """Raises QueueFull where `rows` more do not fit."""
        with self._changed:
            self._check_room(rows)

    def submit(self, jobs: Sequence[Job]) -> None:
        """All rows of a request, or none: raises QueueFull where they do not fit."""
        with self._changed:
            self._check_room(len(jobs))
            self.waiting.extend(jobs)
            self._changed.notify_all()

    def _check_room(self, rows: int) -> None:
        self.waiting = [job for job in self.waiting if not job.left]
        if self._closed or len(self.waiting) + rows > self.config.max_queue:
            batches = 1 + len(self.waiting) // self.config.max_batch
            raise QueueFull(len(self.waiting), math.ceil(self.seconds * batches))

    def _work(self) -> None:
        while jobs := self._take():
            running = [job for job in jobs if job.done.set_running_or_notify_cancel()]
            if running:
                self._run(running)

    def _take(self) -> list[Job]:
        """The next batch, in order of arrival; [] once closed."""
        with self._changed:
            while not self._closed:
                self.waiting = [job for job in self.waiting if not job.left]
                if not self.waiting:
                    self._changed.wait()
                    continue
                first = self.waiting[0]
                batch = [job for job in self.waiting if job is first or job.joins(first)][: self.config.max_batch]
                patience = first.arrived + self.config.max_wait_ms / 1000 - time.monotonic()
                if first.alone or len(batch) == self.config.max_batch or patience <= 0:
                    self.waiting = [job for job in self.waiting if job not in batch]
                    return batch
                self._changed.wait(patience)
        return []

    def _run(self, jobs: list[Job]) -> None:
        started = time.monotonic()
        try:
            results = self.run(jobs)
            for job, result in zip(jobs, results, strict=True):
                job.done.set_result(result)
        except Left as error:
            for job in jobs:
                job.done.set_exception(error)
        except Exception as error:  # whatever it was, the thread lives on and those who wait are told
            if len(jobs) > 1:
                log.warning("a batch of %d rows of kind %s failed (%s); row by row", len(jobs), jobs[0].kind, error)
                for job in jobs:
                    self._run([job])
                return
            if not isinstance(error, UserError):
                log.exception("a row of kind %s failed", jobs[0].kind)
            jobs[0].done.set_exception(error)
        seconds = time.monotonic() - started
        self.seconds = SLOWER * self.seconds + (1 - SLOWER) * seconds
        self.observe(jobs[0].kind, len(jobs), seconds)
