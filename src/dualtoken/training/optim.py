"""The optimiser of encoder and tokenizer, and the course of the learning rate in all trainings (Table 13)."""

import math
from dataclasses import dataclass

import torch
from torch import nn


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
