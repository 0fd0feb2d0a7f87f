"""The training stages of the MLLM as data (paper section 4.2, Table 13)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from dualtoken.core.errors import UserError
from dualtoken.training.muon import MuonAdamW, split_groups
from dualtoken.training.optim import warm_cosine

# What can be trained -> names of parameters begin with one of these. The LLM has its embedding and its last layer.
PARTS: dict[str, tuple[str, ...]] = {
    "projector": ("projector.",),
    "llm": ("llm.",),
    "head_projectors": ("pixel_head.projector.", "semantic_head.projector."),
    "heads": ("pixel_head.", "semantic_head."),  # but for their projectors
}


@dataclass
class Stage:
    """A stage: what learns at which rate, on what.

    Args:
        trains: part (projector, llm, head_projectors, heads) -> learning rate; all else stands still.
        batch_size: samples a step, over all processes and accumulated batches.
        mixture: task -> weight.
        steps: of the optimiser.
    Raises UserError for an unknown part, and for numbers that are too small.
    """

    trains: dict[str, float]
    batch_size: int
    mixture: dict[str, float]
    steps: int = 10000

    def __post_init__(self) -> None:
        unknown = [part for part in self.trains if part not in PARTS]
        if unknown or not self.trains:
            raise UserError(f"stage trains {', '.join(unknown) or 'nothing'}; the parts are {', '.join(PARTS)}")
        if self.batch_size < 1 or self.steps < 0:
            raise UserError(f"stage has batch_size {self.batch_size} and {self.steps} steps; give 1 or more chats")

    @property
    def through_llm(self) -> bool:
        """Whether gradients go through the LLM; else nothing of its pass is kept, and nothing to be computed again."""
        return not {"llm", "projector"}.isdisjoint(self.trains)


@dataclass
class StageOptim:
    """The optimiser of all stages (default: AdamW, Table 13); the rates are the stages'.

    Args:
        kind: adamw, or muon for the matrices between hidden states and AdamW for all else (`training/muon.py`).
        warmup: share of the steps with rising rate.
        final: rate at the end, as a share.
        clip: largest gradient norm, 0 = none.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.03
    final: float = 0.0
    clip: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        """Share of the stage's rates at a step counted from 0."""
        return warm_cosine(step, steps, round(self.warmup * steps), self.final)

    def build(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str]) -> torch.optim.AdamW:
        """The optimiser of groups of parameters, each with its own rate, and of all parameters' names."""
        options = {"betas": tuple(self.betas), "weight_decay": self.weight_decay, "fused": True}
        if self.kind == "muon":
            return MuonAdamW(split_groups(groups, names), **options)
        return torch.optim.AdamW(groups, **options)


LOOK = {"caption": 0.3, "vqa": 0.6, "text": 0.1}
ALL = {"caption": 0.1, "vqa": 0.25, "text_to_image": 0.4, "edit": 0.15, "story": 0.05, "text": 0.05}
STAGES: dict[str, Stage] = {  # rates and batch sizes of Table 13; kinds of data of Table 14
    "1": Stage({"projector": 1e-3}, 64, {"caption": 1.0}),
    "2": Stage({"projector": 2e-5, "llm": 2e-5}, 256, LOOK),
    "3": Stage({"head_projectors": 1e-4, "heads": 1e-4}, 128, {"text_to_image": 1.0}),
    "4-1": Stage({"projector": 1e-5, "head_projectors": 1e-5, "heads": 1e-5, "llm": 1e-5}, 512, ALL),
    "4-2": Stage({"projector": 1e-5, "head_projectors": 1e-5, "heads": 1e-5, "llm": 1e-5}, 256, ALL),
}


def part_of(name: str) -> str | None:
    """The part a parameter belongs to, None for the vision tokenizer."""
    order = ("projector", "llm", "head_projectors", "heads")  # the projectors of the heads before the heads
    return next((part for part in order if name.startswith(PARTS[part])), None)


def recompute_activations(model: nn.Module, stage: Stage) -> None:
    """Keep only what goes into each layer that gradients go through, and compute the rest again (checkpointing)."""
    model.pixel_head.recompute = model.semantic_head.recompute = True
    if stage.through_llm:
        name = next(
            n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model.llm, n)
        )
        getattr(model.llm, name)({"use_reentrant": False})


def set_trained(model: nn.Module, stage: Stage, lora: bool = False) -> dict[str, list[nn.Parameter]]:
    """Let exactly the stage's parts learn; with `lora` only adapters of the LLM. Returns the parameters by part."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in stage.trains}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        learns = part in stage.trains and parameter.is_floating_point()
        if lora and part == "llm":
            learns = learns and "lora_" in name
        parameter.requires_grad_(learns)
        if learns:
            found[part].append(parameter)
    return found


@dataclass
class LoraConfig:
    """Low-rank adapters in place of the whole LLM in stages that train it; merged when the stage is done.

    Args: rank: 0 = train the whole LLM; alpha: scale; dropout; targets: layers, "all-linear" = every linear one.
    """

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = field(default="all-linear")
