"""Work that shows itself while it is done: what it reports is given at once, and who stops listening stops it."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

Report = Callable[[Any], None]


class Stopped(Exception):
    """Ends the work from within its report; no error: nobody waits for it any more."""


def live(work: Callable[[Report], Any], stop: threading.Event | None = None) -> Iterator[Any]:
    """Do `work(report)` in a thread of its own; give all that it reports, and at last what it returns.

    Closing the iterator ends the work at its next report, and waits for that; `report(None)` reports nothing and only
    lets itself be stopped. Setting `stop`, from any thread, ends it too, and the iterator with it. What the work raises
    is raised here.
    """
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    closed = stop or threading.Event()

    def report(value: Any) -> None:
        if closed.is_set():
            raise Stopped
        if value is not None:
            told.put(("reported", value))

    def run() -> None:
        try:
            told.put(("returned", work(report)))
        except Stopped:
            told.put(("stopped", None))
        except BaseException as error:  # nothing may leave the reader waiting
            told.put(("raised", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = told.get()
            if kind == "raised":
                raise value
            if kind == "stopped":
                return
            yield value
            if kind == "returned":
                return
    finally:
        closed.set()
        thread.join()
