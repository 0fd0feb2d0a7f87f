"""Several tables and figures at a time, each in a process of its own; and several parts of one table.

Parts that tables share are trained once.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dualtoken.core.errors import UserError
from dualtoken.paper.experiment import Experiment, Scale, Setting, run, version

Work = tuple[str, Experiment, Setting]  # what `experiment.run` takes


def usual_processes(scale: Scale) -> int:
    """Two where small models on a CPU leave half of two cores idle, otherwise one."""
    return 2 if scale == "mini" and not torch.cuda.is_available() and _cores() > 1 else 1


def run_all(work: Sequence[Work], processes: int) -> None:
    """Make all, `processes` at a time; those that measure times come last, one by one.

    Raises what the first that fails raised, when those that were at work beside it are done; no other one begins.
    """
    beside = [one for one in work if not one[1].alone]
    if processes == 1 or len(beside) == 1:
        beside = []
    if beside:
        _run_beside(beside, min(processes, len(beside)))
    for one in work:
        if one not in beside:
            run(*one)


def _run_beside(work: Sequence[Work], processes: int) -> None:
    waiting, at_work = list(work), dict[Future[None], Work]()
    start = {"initializer": _begin, "initargs": (max(1, _cores() // processes),)}
    with (
        tqdm(total=len(work), desc="tables and figures", unit="") as bar,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), **start) as pool,
    ):
        while waiting or at_work:
            while waiting and len(at_work) < processes:
                one = waiting.pop(0)
                at_work[pool.submit(_run_one, *one)] = one
            bar.set_postfix_str(", ".join(id for id, *_ in at_work.values()))
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                id, _, setting = at_work.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    ids = ", ".join([id, *(other for other, *_ in at_work.values())])
                    raise UserError(
                        f"{ids}: a process was ended, perhaps for lack of memory (--processes 1 takes less); what is "
                        f"trained is kept, the same command goes on; see {setting.out}/*.log"
                    ) from None
                except BaseException:
                    bar.write(f"{id} failed, see {_log(id, setting)}; what is at work beside it comes to its end first")
                    for other in [one for one in at_work if one.exception() is not None]:
                        bar.write(f"{at_work[other][0]} failed too, see {_log(at_work[other][0], setting)}")
                    raise
                bar.update()
                bar.write(f"{id} is made: {setting.out / id}.json")


def _begin(threads: int) -> None:
    """A process of the pool begins: its threads, and its end where the one that began it is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for_end([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state


def _run_one(id: str, experiment: Experiment, setting: Setting) -> None:
    """`run` in a process of the pool, what it prints in a file."""
    with _into_log(_log(id, setting)):
        run(id, experiment, setting)


@contextmanager
def _into_log(place: Path) -> Iterator[None]:
    """What this process prints goes into a file, and so does what it fails with."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a", buffering=1) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise


@contextmanager
def helpers(work: Callable[[Any, Setting], None], what: Any, setting: Setting, number: int) -> Iterator[None]:
    """While it lasts, so many further processes do the same work, and each has its share of the cores.

    What one of them fails at is left for this process, which then meets the same; its output is in OUTPUT/helper-N.log.
    One that would run other code than this process, because files were changed since, leaves all to it.
    """
    threads, share = torch.get_num_threads(), max(1, _cores() // (number + 1))
    context, started = multiprocessing.get_context("spawn"), []
    try:
        for place in range(1, number + 1):
            log = setting.out / f"helper-{place}.log"
            started.append(context.Process(target=_help, args=(work, what, setting, share, log)))
            started[-1].start()
            print(f"another process works beside this one, see {log}")
        if started:
            torch.set_num_threads(share)
        yield
        for place, process in enumerate(started, 1):
            process.join()
            if process.exitcode:
                print(
                    f"the process beside this one ended with {process.exitcode}, see {setting.out}/helper-{place}.log"
                )
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()  # a training saves its state
                process.join()
        torch.set_num_threads(threads)


def _help(work: Callable[[Any, Setting], None], what: Any, setting: Setting, threads: int, log: Path) -> None:
    with _into_log(log):
        _begin(threads)
        if setting.code not in (None, version()):
            print(f"the run is of {setting.code}, the files are now of {version()}: nothing is done here")
            return
        work(what, setting)


def _log(id: str, setting: Setting) -> Path:
    return setting.out / f"{id}.log"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
