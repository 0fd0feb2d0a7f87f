import threading
import time

import pytest

from dualtoken.app.live import live


def test_what_is_reported_comes_first_and_what_is_returned_last():
    assert list(live(lambda report: [report(i) for i in range(3)] and "end")) == [0, 1, 2, "end"]
    assert list(live(lambda report: report(None))) == [None]


def test_what_the_work_raises_is_raised_to_the_reader():
    def work(report):
        report("begun")
        raise ValueError("broken")

    reader = live(work)
    assert next(reader) == "begun"
    with pytest.raises(ValueError, match="broken"):
        next(reader)


def test_a_stop_from_elsewhere_ends_the_work_and_the_reading():
    stop, steps = threading.Event(), []

    def work(report):
        for step in range(1000):
            steps.append(step)
            report(step)
            time.sleep(0.001)

    reader = live(work, stop)
    assert next(reader) == 0
    stop.set()
    assert list(reader) == steps[1 : len(steps) - 1] and len(steps) < 1000


@pytest.mark.parametrize("reported", ["some", None])
def test_who_stops_listening_stops_the_work_and_its_thread(reported):
    steps = []
    go_on = threading.Event()

    def work(report):
        report("first")
        go_on.wait(10)
        for step in range(1000):
            steps.append(step)
            report(reported)
            time.sleep(0.001)

    before = threading.active_count()
    reader = live(work)
    assert next(reader) == "first" and threading.active_count() == before + 1
    closing = threading.Thread(target=reader.close)
    closing.start()
    time.sleep(0.05)
    go_on.set()
    closing.join(10)
    assert len(steps) == 1 and threading.active_count() == before
