"""Commands in processes of their own: several joined by gloo, or one to be stopped or killed.

They are forked from a server that has imported everything, so that starting one takes no time.
"""

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from dualtoken.cli import main
from dualtoken.core import checkpoint
from dualtoken.training import encoder, mllm, tokenizer  # noqa: F401 (imported once for all)
from dualtoken.training.loop import Loop

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@functools.cache
def _serve():
    """Start the server, and have it find what the tests find."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def start(calls, output, count=1, disturb=None):
    """Start `count` processes that run the commands one after the other; `disturb`: a function and its arguments.

    Statuses go to OUTPUT/statuses-RANK.json, what they print to OUTPUT/printed-RANK.
    """
    _serve()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(output).mkdir(parents=True, exist_ok=True)
    given = [(rank, count, port, calls, str(output), disturb) for rank in range(count)]
    processes = [CONTEXT.Process(target=_child, args=each) for each in given]
    for process in processes:
        process.start()
    return processes


def run(calls, output, count=1, disturb=None):
    """The same to the end -> statuses of the commands on the first process. Fails with what was printed."""
    for rank, process in enumerate(start(calls, output, count, disturb)):
        process.join(400)
        printed = (Path(output) / f"printed-{rank}").read_text()
        assert process.exitcode == 0, printed[-3000:]
    statuses = [json.loads((Path(output) / f"statuses-{rank}.json").read_text()) for rank in range(count)]
    assert all(s == statuses[0] for s in statuses), statuses
    return statuses[0]


def _child(rank, count, port, calls, output, disturb):
    printed = os.open(f"{output}/printed-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    # Where a gradient is zero but for rounding (the bias of keys), Adam makes full steps of the rounding.
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-4)
    if count > 1:
        names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    if disturb is not None:
        disturb[0](rank, *disturb[1:])
    statuses = []
    for call in calls:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        AcceleratorState._reset_state(True)
        try:
            statuses.append(main(call))
        except SystemExit as stop:
            statuses.append(stop.code)
    Path(f"{output}/statuses-{rank}.json").write_text(json.dumps(statuses))


def terminate(rank, victim, step):
    """SIGTERM for process number `victim` in a step, counted from 0, of every run."""
    record = Loop.log

    def log(self, number, *args):
        record(self, number, *args)
        if number == step and rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)

    Loop.log = log


def die_writing(rank, at):
    """SIGKILL just before operation number `at` on files of the state or the model, a file half written."""
    count = itertools.count()

    def mortal(owner, name):
        real = getattr(owner, name)

        @functools.wraps(real)
        def operation(*args, **options):
            if next(count) == at:
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, operation)

    for owner, name in ((checkpoint, "save_file"), (checkpoint, "_sync"), (shutil, "rmtree"), (Path, "rename")):
        mortal(owner, name)
    mortal(Path, "mkdir")
