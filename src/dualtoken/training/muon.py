"""Muon beside AdamW in one optimiser: steps of matrices made orthogonal, all else by AdamW.

Keller Jordan's Muon, and the scale that lets it take AdamW's rates, from "Muon is scalable for LLM training"
(arXiv 2502.16982, section 2.2). torch.optim.Muon computes in bfloat16, for which many CPUs have no product, and one
matrix at a time; this one keeps the dtype of the weights and takes all matrices of a shape at once.
"""

from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, by Keller Jordan
RMS = 0.2  # of an update's entries, about AdamW's
TABLES = ("embed_tokens", "embedding", "classifiers", "positions", "places", "lm_head")  # rows of their own: AdamW


def orthogonal(updates: Tensor, steps: int) -> Tensor:
    """Matrices [n, rows, columns] -> nearly the closest with all singular values 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    wide = updates.shape[1] <= updates.shape[2]
    x = updates if wide else updates.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups of matrices with `muon: True`, which take steps of one size in all directions.

    Args: momentum, iterations: of Muon; all else as in AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, iterations: int = 3, **options: Any):
        super().__init__(groups, **options)
        self.momentum, self.iterations = momentum, iterations
        self._step_supports_amp_scaling = False  # AdamW skips infinite gradients itself, Muon does not

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both kinds. (AdamW's own would take Muon's groups too, so it is shown the others alone.)"""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, matrices in shapes.items():
            updates = torch.stack([self._with_momentum(matrix) for matrix in matrices])
            rate = group["lr"] * RMS * max(shape) ** 0.5
            for matrix, update in zip(matrices, orthogonal(updates, self.iterations), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _with_momentum(self, matrix: nn.Parameter) -> Tensor:
        """Nesterov's: the gradient, led by the mean of those before."""
        state = self.state[matrix]
        if not state:  # in AdamW's names, for it also reads the states that it does not step
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
        state["step"] += 1
        mean = state["exp_avg"].lerp_(matrix.grad, 1 - self.momentum)
        return matrix.grad.lerp(mean, self.momentum)


def split_groups(groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> list[dict[str, Any]]:
    """Each group as two: matrices between hidden states, for Muon, and all else; empty ones are left out."""
    found = []
    for group in groups:
        for muon in (True, False):
            chosen = [p for p in group["params"] if _is_hidden(names[p], p) is muon]
            if chosen:
                found.append(group | {"params": chosen, "muon": muon})
    return found


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(part in TABLES for part in name.split("."))
