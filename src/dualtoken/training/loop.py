"""What every training loop needs around its few lines: devices, resuming, progress, tracking, stopping on NaN.

The loops themselves are visible functions (`training/encoder.py`, `training/tokenizer.py`). A step's data, random
numbers and learning rate are functions of the step number, so the state to save is weights and optimiser alone.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from dualtoken.core.checkpoint import disk_errors, latest_state, load_state, save_state
from dualtoken.core.distributed import add_counts, any_process, on_main
from dualtoken.core.errors import UserError, whole_number
from dualtoken.training.health import MOST_SKIPPED, Pace, Skipped, collapsed
from dualtoken.training.sharded import allow_cpu, save_shards, shard, shard_plugin

# What the others wait for the main process: it alone makes the codes of all pictures, and evaluates the tokenizer.
PATIENCE = timedelta(hours=3)


@dataclass
class LoopConfig:
    """How a run is carried out; none of it but precision and accumulation changes what is learnt.

    Args:
        precision: "no" (float32), "bf16" or "fp16".
        accumulate: batches whose gradients make up one step.
        save_every, keep: a state every so many steps, of which the newest are kept.
        eval_every: evaluation and sample pictures every so many steps.
        log_every: a line in log.jsonl and the tracker every so many steps.
        tracker: "tensorboard" or "none".
        gradient_checkpointing: compute activations of the LLM and the heads again going back, for less memory
            (train-mllm).
        shard: FSDP2: split weights, gradients and moments over the processes (train-mllm); also chosen by an
            `accelerate config` with FSDP.
        on_nan: stop where a loss or gradient is not finite, or skip that step's update with a warning (10 in a row
            stop nonetheless; codebooks that move by EMA have then moved already).
        on_collapse: what follows where codes of a batch have a perplexity below `collapse` at some depth
            (train-tokenizer): a warning, a stop, or nothing. Looked at with every line of the log.
    """

    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    save_every: int = 500
    keep: int = 2
    eval_every: int = 1000
    log_every: int = 20
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    gradient_checkpointing: bool = False
    shard: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    collapse: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("accumulate", 1), ("keep", 1), ("save_every", 0), ("eval_every", 0), ("log_every", 0)):
            whole_number(f"--loop.{name}", getattr(self, name), least)


FREE = ("output", "loop", "resume", "evaluation", "dtype")  # settings that may change while a run goes on


class Loop:
    """A run in a folder: states in `states/`, `log.jsonl`, `settings.json`, tracker files in `tensorboard/`.

    Args:
        samples: pictures or chats of a step, over all processes.
        shards: whether this kind of training can be split over processes (FSDP2).
        rate: the option that has the learning rate, for advice.
    """

    def __init__(
        self,
        output: str,
        steps: int,
        seed: int,
        resume: str,
        config: LoopConfig,
        settings: dict[str, Any],
        samples: int = 0,
        title: str = "",
        shards: bool = False,
        rate: str = "--optim.lr",
    ):
        self.output, self.steps, self.seed, self.config = Path(output), steps, seed, config
        states = self.output / "states"
        if resume == "never" and states.is_dir() and any(states.iterdir()):
            raise UserError(f"--output {output}: holds a run already; take another folder, or --resume auto to go on")
        wanted = config.shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if wanted and not shards:
            raise UserError("--loop.shard: train-mllm alone can be split (FSDP2); start this one without it")
        plugin = shard_plugin() if wanted else None
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else accelerate sees no other process where there is no GPU
            mixed_precision=config.precision,
            log_with="tensorboard" if config.tracker == "tensorboard" else None,
            project_dir=self.output / "tensorboard",
            fsdp_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        if plugin is not None:
            allow_cpu(self.accelerator, plugin)
        self.sharded = self.accelerator.is_fsdp2
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.start = 0
        self._settings = json.loads(json.dumps(settings, default=lambda v: asdict(v) if is_dataclass(v) else str(v)))
        self._last: Path | None = None
        self._lost: OSError | None = None  # why the newest save did not succeed
        self._terminated = self._stopping = False
        self._pace, self._skipped = Pace(steps, samples), Skipped()
        self._bad_steps: list[int] = []  # the last ones in a row that were left out
        self._bar: tqdm | None = None
        self._title, self._rate = title, rate
        on_main(lambda: self.output.mkdir(parents=True, exist_ok=True))
        if config.tracker == "tensorboard":
            self.accelerator.init_trackers("run")

    def share(self, batch_size: int) -> int:
        """Samples of a batch that fall to each process. Raises UserError where they cannot be shared out."""
        share, rest = divmod(batch_size, self.accelerator.num_processes)
        if rest or not share:
            raise UserError(
                f"--data.batch_size {batch_size} cannot be split over {self.accelerator.num_processes} processes"
            )
        return share

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Model and optimizer for many processes: a copy on each (DDP), or split over them (FSDP2)."""
        return (shard if self.sharded else Accelerator.prepare)(self.accelerator, model, optimizer)

    def restore(self, load: Callable[[Path], dict[str, Any]] = load_state) -> dict[str, Any] | None:
        """The newest whole state of the folder, or None. Raises UserError where it is of another recipe."""
        found = latest_state(self.output / "states", load)
        self.start = 0 if found is None else found[1]["step"]
        if any_process(on_main(lambda: self.start) != self.start, self.device):
            raise UserError(f"--output {self.output}: not all processes see the same states; take a folder they share")
        if found is None:
            if self.main:
                (self.output / "settings.json").write_text(json.dumps(self._settings, indent=1))
            return None
        self._last, state = found
        earlier = json.loads((self.output / "settings.json").read_text())
        changed = sorted(k for k in self._settings if self._settings[k] != earlier.get(k) and k not in FREE)
        if changed:
            raise UserError(
                f"--output {self.output}: its run has another {changed[0]} ({earlier.get(changed[0])} there, "
                f"{self._settings[changed[0]]} here); take another folder or the same settings"
            )
        self.say(f"going on from step {self.start} ({self._last})")
        return state

    def saves(self, step: int) -> bool:
        """True after step number `step` where its state is to be written: when due, and before a stop by SIGTERM."""
        self._stopping = any_process(self._terminated, self.device)  # the signal need not reach all at the same step
        return self._stopping or self.due(step, self.config.save_every)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps. Training goes on where there is no room: what is there stays valid."""
        state = {"step": step, **state}
        folder, keep = self.output / "states", self.config.keep
        try:
            if self.sharded:
                self._last = save_shards(folder, step, state, keep)
            else:
                self._last = on_main(lambda: save_state(folder, step, state, keep))
            self._lost = None
        except OSError as error:
            self._lost = error
            self.say(
                f"warning: the state after step {step} was not written ({_reason(error)}); a stop now loses what came "
                f"after {self._last or 'the start'}; free space for {folder}, or take a smaller --loop.keep; tried "
                f"again when the next is due (--loop.save_every {self.config.save_every})"
            )

    def write(self, save: Callable[[Path], Any], name: str = "model") -> Path:
        """A directory of the run, by the main process, whole or not at all. Raises UserError where the disk is full."""
        place, draft = self.output / name, self.output / f"{name}.draft"

        def whole() -> Path:
            shutil.rmtree(draft, ignore_errors=True)
            with disk_errors():
                save(draft)
            shutil.rmtree(place, ignore_errors=True)
            return draft.rename(place)

        try:
            return on_main(whole)
        except OSError as error:
            if self.main:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(
                f"{place} was not written ({_reason(error)}); free space and give the same command again: it goes on "
                f"from {self._last or 'the start'}" + (", and what came after it is lost" if self._lost else "")
            ) from None

    def run(self) -> Iterator[int]:
        """Steps still to do, each with its own random state, under a progress bar.

        Raises SystemExit with status 143 after the step in which SIGTERM came, once its state is saved (`saves`).
        """
        self._bar = tqdm(
            desc=self._title or None,
            total=self.steps,
            initial=self.start,
            disable=not self.main,
            mininterval=1 if sys.stderr.isatty() else 60,
        )
        self._pace.begin(self.start)
        with self._hear_sigterm():
            for step in range(self.start, self.steps):
                seed_step(self.seed, step, self.accelerator.process_index)
                yield step
                self._bar.update()
                if self._stopping:
                    self._stop(step)
        self._finish()

    @contextlib.contextmanager
    def _hear_sigterm(self) -> Iterator[None]:
        """Note SIGTERM, which a scheduler sends before it takes the machine away, in place of dying of it."""
        if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
            yield
            return

        def note(*_: Any) -> None:
            self._terminated = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop(self, step: int) -> None:
        self._finish()
        if self._lost is None:
            told = f"saved in {self._last}; the same command goes on from there"
        else:
            told = f"not saved ({_reason(self._lost)}): what came after {self._last or 'the start'} is lost"
        if self.main:
            print(f"stopped by SIGTERM after step {step + 1}; {told}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    def _finish(self) -> None:
        self._bar.close()
        for tracker in self.accelerator.trackers:  # end_training() would also end what the next stage talks over
            tracker.finish()

    def due(self, step: int, every: int) -> bool:
        """True after step number `step` (from 0) when `every` steps are full, and after the last."""
        return every > 0 and ((step + 1) % every == 0 or step + 1 == self.steps)

    def take(self, stream: Iterator[Any]) -> Any:
        """The next batch of a stream; the time it takes is logged as waiting, what its files lack as skipped."""
        batch = self._pace.take(stream)
        self.skip(getattr(batch, "skipped", ()))
        return batch

    def skip(self, lines: Iterable[str]) -> None:
        """Count what could not be read, "NAME: reason" each, and tell the first of it."""
        for line in lines:
            if self._skipped.add(line) <= 20:
                self.say(f"skipped: {line}")

    def learn(self, sound: bool, *optimizers: Any) -> None:
        """Let optimizers take their step, unless it is to be left out; gradients are cleared. Clip them before.

        Under fp16 one scaler serves all optimizers of a step, and backs off also where the step is left out.
        """
        scaler = self.accelerator.scaler
        for optimizer in optimizers if sound else ():
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(getattr(optimizer, "optimizer", optimizer))
        if scaler is not None:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def check(self, step: int, parts: dict[str, Tensor]) -> bool:
        """Whether all parts are finite, which are the same on every process.

        Under fp16 a "gradient" may overflow: accelerate's scaler leaves out such steps itself. Raises UserError with
        step, part and last good state where a part is not finite, unless such steps are skipped.
        """
        parts = {k: v for k, v in parts.items() if k != "gradient" or self.accelerator.scaler is None}
        finite = torch.stack([v.detach().float().isfinite().all() for v in parts.values()]) if parts else torch.ones(0)
        if bool(finite.all()):
            return True
        told = ", ".join(name for name, good in zip(parts, finite.tolist(), strict=True) if not good)
        if step not in self._bad_steps:
            self._bad_steps = [*(self._bad_steps if step - 1 in self._bad_steps else []), step]
        if self.config.on_nan == "skip" and len(self._bad_steps) < MOST_SKIPPED:
            self.say(f"warning: step {step} changes nothing: {told} not finite")
            return False
        advice = f"a lower {self._rate} or --loop.precision no may help"
        if self.config.on_nan == "skip":
            advice = f"{MOST_SKIPPED} steps in a row were skipped; {advice}"
        raise self._stopped(step, f"{told} not finite", advice)

    def check_codebooks(self, step: int, perplexity: dict[str, Tensor]) -> None:
        """Warn or stop where the codes of a step, [D] perplexities over all processes by vocabulary, have collapsed."""
        if self.config.on_collapse == "ignore" or not self.due(step, self.config.log_every):
            return
        if found := collapsed(perplexity, self.config.collapse):
            told = f"codes have collapsed: {', '.join(found)}, below --loop.collapse {self.config.collapse:g}"
            if self.config.on_collapse == "stop":
                advice = (
                    "a higher weight of the codebook's losses, a smaller codebook or --loop.on_collapse warn may help"
                )
                raise self._stopped(step, told, advice)
            self.say(f"warning: step {step}: {told}")

    def _stopped(self, step: int, what: str, advice: str) -> UserError:
        if self._bar is not None:
            self._bar.close()  # before the error is printed, not over it
        good = self._last or "none yet (--loop.save_every)"
        return UserError(f"training stopped at step {step}: {what}; last good state: {good}; {advice}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Show and record values (numbers and one-element tensors), the pace, and what all processes skipped.

        Every process must call it.
        """
        if not self.due(step, self.config.log_every):
            return
        skipped = add_counts(self._skipped.kinds)
        if not self.main:
            return
        numbers = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in values.items()}
        pace = self._pace.look(step + 1)
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in list(numbers.items())[:6]}, refresh=False)
        line = {"step": step + 1, **{k: round(v, 6) for k, v in numbers.items()}, **pace}
        self.record(line | ({"skipped": dict(skipped)} if skipped else {}))
        with self.sparing("lines of the tracker"):
            self.accelerator.log(numbers | pace, step=step + 1)

    def record(self, line: dict[str, Any]) -> None:
        """One line into log.jsonl."""
        if self.main:
            with self.sparing("a line of log.jsonl"), open(self.output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def sparing(self, what: str) -> Iterator[None]:
        """Go on without `what` where the disk is full, and say so."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: {what} could not be written ({_reason(error)})")

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        if self.main:
            tqdm.write(text)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random state of torch as a function of its arguments."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(number)
