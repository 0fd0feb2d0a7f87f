"""How a run is doing: its pace, what it waits for, what could not be read and why, values and codebooks gone bad."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

MOST_KINDS = 50  # of errors; what is of others counts as one, so that a line of the log stays short
MOST_SKIPPED = 10  # steps in a row that --loop.on_nan skip leaves out before it gives up


class Pace:
    """Speed since the last look.

    Args: steps: of the whole run; samples: of a step, over all processes.
    """

    def __init__(self, steps: int, samples: int):
        self.steps, self.samples = steps, samples
        self.begin(0)

    def begin(self, step: int) -> None:
        """Count from here: `step` steps are done."""
        self._since, self._at, self._waited = time.perf_counter(), step, 0.0

    def take(self, stream: Iterator[Any]) -> Any:
        """The next batch; the time until it is there counts as waiting."""
        asked = time.perf_counter()
        batch = next(stream)
        self._waited += time.perf_counter() - asked
        return batch

    def look(self, step: int) -> dict[str, float]:
        """Steps and samples a second, the share of the time spent waiting for data, and the minutes left."""
        seconds, done = max(1e-9, time.perf_counter() - self._since), step - self._at
        found = {
            "steps_per_s": done / seconds,
            "samples_per_s": done * self.samples / seconds,
            "waiting": self._waited / seconds,
            "minutes_left": (self.steps - step) * seconds / max(1, done) / 60,
        }
        self.begin(step)
        return {name: round(value, 3) for name, value in found.items()}


class Skipped:
    """Counts of what could not be read, by kind of error."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, line: str) -> int:
        """Count a line "NAME: reason"; returns how many there are by now."""
        reason = line.partition(": ")[2] or line
        kind = re.sub(r"\d[\d,]*", "N", reason.partition(" (")[0])  # so that 900 x 4 and 800 x 3 pixels are one kind
        kind = kind[:60]
        self.kinds[kind if kind in self.kinds or len(self.kinds) < MOST_KINDS else "other errors"] += 1
        return self.kinds.total()


def collapsed(perplexity: dict[str, Tensor], least: float) -> list[str]:
    """Vocabularies and depths whose codes [D] have a perplexity below `least`, in words."""
    return [
        f"{name} depth {depth} (perplexity {value:.2f})"
        for name, values in perplexity.items()
        for depth, value in enumerate(values.tolist(), 1)
        if value < least
    ]
