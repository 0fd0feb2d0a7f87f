"""From logits to codes: guidance, temperature, top-k, top-p, and randomness that belongs to one image alone.

Shapes: B images, N positions, D depth, K codebook size.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dualtoken.core.errors import UserError, finite_number, whole_number

DrawEngine = Literal["auto", "plain", "static", "graph", "compiled"]


@dataclass
class HeadSampling:
    """How one head draws; `temperature` 0 takes the likeliest code, `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        if finite_number("temperature", self.temperature) < 0:
            raise UserError(f"temperature {self.temperature} must be 0 (the likeliest code) or above")
        whole_number("top_k", self.top_k, 0)
        if not 0 < finite_number("top_p", self.top_p) <= 1:
            raise UserError(f"top_p {self.top_p} must lie above 0 and up to 1")


@dataclass
class DrawConfig:
    """How images are drawn.

    Args:
        guidance: weight of classifier-free guidance on both heads; 1 = none, and half the work.
        pixel, semantic: sampling of each head.
        semantic_codes: False draws with pixel codes alone; the model then sees no meaning in what it draws.
        engine: how a position is computed; the codes are the same but for rounding. "plain": any LLM. "static": all
            state at fixed addresses. "graph": on a GPU, "static" recorded as a CUDA graph and played for every
            position, up to four rows of a Qwen2 or Llama LLM and of the heads through own kernels, and sampling of any
            number through one. "compiled": the step through torch.compile (minutes at first), then recorded. "auto":
            "graph" on a GPU where the LLM is Qwen2 or Llama with weights as they come, else "plain".
    """

    guidance: float = 3.0
    pixel: HeadSampling = field(default_factory=HeadSampling)
    semantic: HeadSampling = field(default_factory=HeadSampling)
    semantic_codes: bool = True
    engine: DrawEngine = "auto"

    def __post_init__(self) -> None:
        finite_number("guidance", self.guidance)
        if self.engine not in get_args(DrawEngine):
            raise UserError(f"draw engine {self.engine!r} must be one of {', '.join(get_args(DrawEngine))}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DrawConfig":
        """The inverse of dataclasses.asdict."""
        heads = {name: HeadSampling(**values[name]) for name in ("pixel", "semantic")}
        return cls(**values | heads)

    def changed(
        self,
        guidance: float | None = None,
        pixel: dict[str, Any] | None = None,
        semantic: dict[str, Any] | None = None,
        semantic_codes: bool = True,
    ) -> "DrawConfig":
        """The same with other values where they are given. Raises UserError for what a head has not."""
        heads = {}
        for name, values in (("pixel", pixel or {}), ("semantic", semantic or {})):
            if not isinstance(values, dict):
                raise UserError(f"{name} {values!r}: give a dict of {', '.join(vars(self.pixel))}")
            if unknown := set(values) - set(vars(self.pixel)):
                raise UserError(f"{name}: unknown {', '.join(sorted(unknown))}; known: {', '.join(vars(self.pixel))}")
            heads[name] = replace(getattr(self, name), **values)
        guidance = self.guidance if guidance is None else guidance
        return replace(self, guidance=guidance, semantic_codes=self.semantic_codes and semantic_codes, **heads)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Logits [2B, K], first with the prompt and then without -> [B, K]: u + guidance (c - u)."""
    with_prompt, without = logits.float().chunk(2)
    return without + guidance * (with_prompt - without)


def keep_likely(logits: Tensor, sampling: HeadSampling) -> tuple[Tensor, Tensor]:
    """Logits [B, K] -> probabilities in falling order and their codes, both [B, k], after top-k, then top-p.

    Top-p keeps the code that crosses the threshold.
    """
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, codes = logits.topk(kept, -1)  # sorted
    probabilities = (values / max(sampling.temperature, 1e-6)).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), codes


def sample(logits: Tensor, sampling: HeadSampling, uniform: Tensor) -> Tensor:
    """One code for each row: logits [B, K] and uniform numbers [B] in [0, 1) -> int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, codes = keep_likely(logits.float(), sampling)
    chosen = (probabilities.cumsum(-1) <= uniform[:, None]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding may leave the sum below the uniform number
    return codes.gather(-1, torch.minimum(chosen, last))[:, 0]


def choose(logits: Tensor, sampling: HeadSampling, guidance: float, uniform: Tensor) -> Tensor:
    """One code for each image: logits [B or, to be guided, 2B, K] and uniform numbers [B] -> int64 [B]."""
    guided = len(logits) > len(uniform)
    return sample(guide(logits, guidance) if guided else logits, sampling, uniform)


def uniforms(seeds: list[int], positions: int, depth: int, device: torch.device) -> Tensor:
    """Random numbers [B, N, 2, D], a row from each seed alone, so that an image does not depend on its batch."""
    rows = [torch.rand(positions, 2, depth, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)
