"""What every training loop needs around its few lines: devices, resuming, progress, tracking, stopping on NaN.

The loops themselves are visible functions (`training/encoder.py`, `training/tokenizer.py`). A step's data, random
numbers and learning rate are functions of the step number, so the state to save is weights and optimiser alone.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dualtoken.core.checkpoint import latest_state, save_state
from dualtoken.core.errors import UserError


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
        gradient_checkpointing: compute the LLM's activations again going back, for less memory (train-mllm).
    """

    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    save_every: int = 500
    keep: int = 2
    eval_every: int = 1000
    log_every: int = 20
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    gradient_checkpointing: bool = False


def warm_cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final`, at a step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay (defaults: the paper's tokenizer, Table 13).

    Args: warmup: steps; clip: largest gradient norm, 0 = none; final: learning rate at the end, as a share.
    """

    lr: float = 7.2e-5
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 1e-4
    warmup: int = 1000
    clip: float = 1.0
    final: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step counted from 0."""
        return self.lr * warm_cosine(step, steps, self.warmup, self.final)

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser; weight decay on matrices only."""
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=tuple(self.betas), fused=True)

    def step(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """Set the learning rate of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, steps)


class Loop:
    """A run in a folder: states in `states/`, `log.jsonl`, `settings.json`, tracker files in `tensorboard/`."""

    def __init__(
        self,
        output: str,
        steps: int,
        seed: int,
        resume: str,
        config: LoopConfig,
        settings: dict[str, Any],
        title: str = "",
    ):
        self.output, self.steps, self.seed, self.config = Path(output), steps, seed, config
        states = self.output / "states"
        if resume == "never" and states.is_dir() and any(states.iterdir()):
            raise UserError(f"--output {output}: holds a run already; take another folder, or --resume auto to go on")
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            log_with="tensorboard" if config.tracker == "tensorboard" else None,
            project_dir=self.output / "tensorboard",
        )
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.start = 0
        self._settings = json.loads(json.dumps(settings, default=lambda v: asdict(v) if is_dataclass(v) else str(v)))
        self._last: Path | None = None
        self._skipped = 0
        self._bar: tqdm | None = None
        self._title = title
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
        if config.tracker == "tensorboard":
            self.accelerator.init_trackers("run")

    def restore(self) -> dict[str, Any] | None:
        """The newest whole state of the folder, or None. Raises UserError where it is of another recipe."""
        found = latest_state(self.output / "states")
        if found is None:
            if self.main:
                (self.output / "settings.json").write_text(json.dumps(self._settings, indent=1))
            return None
        self._last, state = found
        self.start = state["step"]
        earlier = json.loads((self.output / "settings.json").read_text())
        changed = sorted(
            k for k in self._settings if self._settings[k] != earlier.get(k) and k not in ("output", "loop", "resume")
        )
        if changed:
            raise UserError(
                f"--output {self.output}: its run has another {changed[0]} ({earlier.get(changed[0])} there, "
                f"{self._settings[changed[0]]} here); take another folder or the same settings"
            )
        self.say(f"going on from step {self.start} ({self._last})")
        return state

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps (main process only)."""
        self.accelerator.wait_for_everyone()
        if self.main:
            self._last = save_state(self.output / "states", step, {"step": step, **state}, self.config.keep)

    def run(self) -> Iterator[int]:
        """Steps still to do, each with its own random state, under a progress bar."""
        self._bar = tqdm(
            desc=self._title or None,
            total=self.steps,
            initial=self.start,
            disable=not self.main,
            mininterval=1 if sys.stderr.isatty() else 60,
        )
        self._since, self._at = time.time(), self.start
        for step in range(self.start, self.steps):
            seed_step(self.seed, step, self.accelerator.process_index)
            yield step
            self._bar.update()
        self._bar.close()
        self.accelerator.end_training()

    def due(self, step: int, every: int) -> bool:
        """True after step number `step` (from 0) when `every` steps are full, and after the last."""
        return every > 0 and ((step + 1) % every == 0 or step + 1 == self.steps)

    def check(self, step: int, parts: dict[str, Tensor]) -> None:
        """Stop where a part of the loss is not finite. Raises UserError with step, part and last good state."""
        finite = torch.stack([v.detach().float().isfinite().all() for v in parts.values()])
        if not bool(finite.all()):
            bad = [name for name, good in zip(parts, finite.tolist(), strict=True) if not good]
            if self._bar is not None:
                self._bar.close()  # before the error is printed, not over it
            good = self._last or "none yet (--loop.save_every)"
            raise UserError(
                f"training stopped at step {step}: {', '.join(bad)} not finite; last good state: {good}; "
                "a lower --optim.lr or --loop.precision no may help"
            )

    def log(self, step: int, values: dict[str, Any], skipped: list[str] | None = None) -> None:
        """Show and record values (numbers and one-element tensors); count files that could not be read."""
        for line in skipped or []:
            self._skipped += 1
            if self._skipped <= 20:
                self.say(f"skipped: {line}")
        if not self.main or not self.due(step, self.config.log_every):
            return
        numbers = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in values.items()}
        speed = (step + 1 - self._at) / max(1e-9, time.time() - self._since)
        self._since, self._at = time.time(), step + 1
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in list(numbers.items())[:6]}, refresh=False)
        line = {"step": step + 1, **{k: round(v, 6) for k, v in numbers.items()}, "steps_per_s": round(speed, 2)}
        self.record(line | ({"skipped": self._skipped} if self._skipped else {}))
        self.accelerator.log(numbers, step=step + 1)

    def record(self, line: dict[str, Any]) -> None:
        """One line into log.jsonl."""
        if self.main:
            with open(self.output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        if self.main:
            tqdm.write(text)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random state of torch as a function of its arguments."""
    number = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(number)
