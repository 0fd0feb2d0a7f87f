"""One case: time over repeats, and the memory that the work takes on top. On a CPU in a process of its own."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What a person chose; sizes follow from `size`.

    Args:
        size: "full" for figures, "tiny" to see that it runs (nothing is meant by its figures).
        repeats, seconds: the work is repeated until one of them is reached; at least once after the first time.
        largest: cases of more rows are left out.
        without: cases that have one of these words in their group or name are left out.
        reference: a checkout of the paper's repository.
    """

    size: Literal["full", "tiny"] = "full"
    device: str = "cpu"
    repeats: int = 5
    seconds: float = 20.0
    largest: int = 2**20
    without: tuple[str, ...] = ()
    reference: str | None = None

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"


@dataclass
class Work:
    """What is timed.

    Args:
        run: one time of it.
        units, unit: of what it makes in one time, for a column of "unit/s".
        facts: asked after the timing; written under the table.
    """

    run: Callable[[], object]
    units: int = 1
    unit: str = ""
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Args:
        group: what is compared; the lines of a group share one "ours".
        name: who does it.
        role: "ours", "reference", or "limit" (what the hardware would need for the unavoidable part).
        make: builds the inputs, in the process that measures.
        rows: the x axis where groups with one `series` are a plot of growth.
        rounds: at most so many repeats, for what takes minutes.
    """

    group: str
    name: str
    role: Literal["ours", "reference", "limit"]
    make: Callable[[], Work]
    rows: int = 0
    series: str = ""
    rounds: int = 100


@dataclass
class Measured:
    """Seconds of each repeat, MiB on top of what was there before, MiB of the whole process or of the GPU."""

    seconds: list[float]
    extra_mib: float
    whole_mib: float
    units: int = 1
    unit: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(case: Case, options: Options) -> Measured:
    """Build the case and time it; the first time is for memory and to warm up, unless it alone takes all the time."""
    work = case.make()
    before = _start_peak(options.device)
    times = [_time(work.run, options.device)]
    extra, whole = _peak(options.device, before)
    spent, limit = times[0], min(options.repeats, case.rounds)
    while len(times) <= limit and (spent < options.seconds or (len(times) == 1 and spent < 3 * options.seconds)):
        times.append(_time(work.run, options.device))
        spent += times[-1]
    return Measured(times[1:] or times, extra / MIB, whole / MIB, work.units, work.unit, work.facts())


def _time(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _start_peak(device: str) -> int:
    """Forget the peak so far; gives the bytes in use."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # not Linux, or not allowed: the peak of the whole life of the process, which setup may have made
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak(device: str, before: int) -> tuple[int, int]:
    """Bytes on top of `before`, and in all, at the highest point since."""
    if device != "cpu":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            peak = _status("VmHWM")
        except OSError:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(0, peak - before), peak


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(found.split()[1]) * 1024
