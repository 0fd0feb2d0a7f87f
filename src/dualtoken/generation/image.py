"""Drawing: position by position through the LLM, depth by depth through both heads (eq. 5, 7).

Prompts stand in the batch twice, with and without their text, for classifier-free guidance. Every pass is cached:
the LLM's keys and values (`generation/llm_cache.py`), the heads' depth steps, the causal projection behind each
quantiser. But for the LLM's cache on the engine "plain" all state is changed in place, and nothing of ours waits for
the device, so that a position's whole step can be recorded as a CUDA graph.

Shapes: B images, N positions, D depth, K codebook size, H width of the LLM.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation.context import Context, Model, Rows, join
from dualtoken.generation.llm_cache import FixedContext, GrowingContext, room_for
from dualtoken.generation.sampling import DrawConfig, HeadSampling, choose, uniforms
from dualtoken.tokenizer.branch import AttentionCache, Branch, FixedCache
from dualtoken.tokenizer.quantizer import kernel_at_hand

RECORDED = ("graph", "compiled")  # engines whose steps are recorded on a GPU
WARM_UP = 3  # positions drawn before a graph is recorded, so that libraries have made their choices and buffers
Choose = Callable[[Tensor, HeadSampling, float, Tensor], Tensor]
ONE_AT_A_TIME = Lock()  # torch records one graph at a time in a process


class FeatureSteps:
    """Features of a drawn image while it grows: codes [B, 1, D] of the next position -> features [B, 1, C].

    Args: sums: put the sums of rows behind them, as `DualTokenForConditionalGeneration.features` does.
    """

    def __init__(self, branch: Branch, cache: AttentionCache | None = None, sums: bool = False):
        self.branch, self.cache, self.sums = branch, cache or AttentionCache(), sums

    def __call__(self, codes: Tensor) -> Tensor:
        rows = self.branch.quantizer.rows_of(codes)
        features = self.branch.post.step(rows, self.cache)
        return torch.cat([features, rows], -1) if self.sums else features


def draw_codes_of_position(
    head, hidden: Tensor, sampling: HeadSampling, guidance: float, uniform: Tensor, depth: int, choose: Choose
) -> Tensor:
    """All D codes of one position: hidden [B or 2B, H], uniform [B, D] -> int64 [B, D]; `choose` guides and samples."""
    state, given, chosen = head.start(), hidden, []
    copies = len(hidden) // len(uniform)
    for d in range(depth):
        chosen.append(choose(head.step(state, given), sampling, guidance, uniform[:, d]))
        given = chosen[-1].repeat(copies)
    return torch.stack(chosen, -1)


class Drawing:
    """B images while they grow: `begin` draws the first position, every `advance` the next, in place.

    But on the engine "plain" it can `restart` with other prompts and seeds, all its state staying where it is.
    """

    def __init__(self, model: Model, rows: Rows, copies: int, config: DrawConfig, seeds: list[int]):
        settings = model.config
        self.model, self.rows, self.copies, self.config = model, rows, copies, config
        self.names = ("pixel", "semantic") if draws_semantic(model, config) else ("pixel",)
        self.positions, device = settings.positions, rows.embeds.device
        self.context = kind_of_context(model, config, rows)(model, rows.mask, rows.positions, self.positions - 1)
        self.heads = {n: head_of(model, config, n, rows) for n in self.names}
        self.choose = chooser(model, config)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the position drawn last
        depths = {name: getattr(settings, f"{name}_head")["depth"] for name in ("pixel", "semantic")}
        self.noise = uniforms(seeds, self.positions, max(depths.values()), device)
        self.codes = {n: torch.zeros(len(seeds), self.positions, d, dtype=torch.int64, device=device)
                      for n, d in depths.items()}  # fmt: skip
        branches = {name: getattr(model.vision_tokenizer, name) for name in self.names}
        sums = settings.projector["sums"]
        alone = config.engine not in RECORDED or device.type != "cuda" or len(self.names) == 1
        self.beside = None if alone else torch.cuda.Stream(device)
        self.steps = {n: FeatureSteps(b, FixedCache(b.post, len(seeds), self.positions, self.at), sums)
                      for n, b in branches.items()}  # fmt: skip

    def restart(self, rows: Rows, seeds: list[int]) -> None:
        """Other images, as many, of prompts that fit into the same room."""
        self.rows = rows
        self.context.restart(rows.mask, rows.positions)
        self.noise.copy_(uniforms(seeds, *self.noise.shape[1::2], self.noise.device))
        for state in (self.at, *self.codes.values()):
            state.zero_()

    def begin(self) -> None:
        """Read the prompts and draw position 1."""
        self._choose(self.context.read(self.rows.embeds))

    def advance(self) -> None:
        """Read the position drawn last and draw the next."""
        hidden = self._read()
        self.at.add_(1)
        self._choose(hidden)

    def _read(self) -> Tensor:
        """The position drawn last through both branches, the projector and the LLM -> its state, [B or 2B, H]."""
        features = self._by_vocabulary(lambda name: self.steps[name](self.codes[name].index_select(1, self.at)))
        pixel = features["pixel"].to(self.rows.embeds.dtype)
        semantic = features["semantic"].to(pixel.dtype) if "semantic" in features else self._unknown(pixel)
        embeds = self.model.projector(pixel, semantic, first=self.at)
        return self.context.read(embeds.repeat(self.copies, 1, 1))

    def _unknown(self, pixel: Tensor) -> Tensor:
        """What stands in place of semantic features that are not drawn."""
        return pixel.new_zeros(*pixel.shape[:-1], self.model.projector.widths[1])

    def _choose(self, hidden: Tensor) -> None:
        """Codes of position `at` from the state before it, [B or 2B, H]."""
        noise = self.noise.index_select(1, self.at)[:, 0]
        noises = dict(zip(("pixel", "semantic"), noise.unbind(1), strict=True))
        self._by_vocabulary(lambda name: self._choose_by(name, hidden, noises[name]))

    def _choose_by(self, name: str, hidden: Tensor, noise: Tensor) -> None:
        sampling, head = getattr(self.config, name), self.heads[name]
        depth, guidance = head.config.depth, self.config.guidance
        codes = draw_codes_of_position(head, hidden, sampling, guidance, noise, depth, self.choose)
        self.codes[name].index_copy_(1, self.at, codes[:, None])

    def _by_vocabulary(self, work: Callable[[str], Any]) -> dict[str, Any]:
        """What is done for each vocabulary alone, by name.

        Where steps are recorded they are two branches of the graph, side by side: neither fills a GPU.
        """
        if self.beside is None or torch.compiler.is_compiling():
            return {name: work(name) for name in self.names}
        main = torch.cuda.current_stream()
        self.beside.wait_stream(main)
        with torch.cuda.stream(self.beside):
            done = {"semantic": work("semantic")}
        done["pixel"] = work("pixel")
        main.wait_stream(self.beside)
        return done


def draws_semantic(model: Model, config: DrawConfig) -> bool:
    """Whether semantic codes are drawn, and seen in what is drawn."""
    return config.semantic_codes and model.config.output == "both"


def engine_of(model: Model, config: DrawConfig) -> DrawConfig:
    """The settings with "auto" resolved: "graph" on a GPU for LLMs of the kind that it was run with, else "plain"."""
    if config.engine != "auto":
        return config
    ready = kernels_at_hand(model.device)
    if ready:
        from dualtoken.generation.fused_llm import plain_layers  # Triton is not on every machine

        ready = plain_layers(model)
    return replace(config, engine="graph" if ready else "plain")


def kernels_at_hand(device: torch.device) -> bool:
    """Whether there are Triton and a GPU for own kernels."""
    return device.type == "cuda" and kernel_at_hand(device)


def kind_of_context(model: Model, config: DrawConfig, rows: Rows) -> type[GrowingContext]:
    """How the LLM goes on: growing, with fixed room, or through kernels of few launches where they pay."""
    if config.engine == "graph" and kernels_at_hand(model.device):
        from dualtoken.generation.fused_llm import FusedContext, fits

        if fits(model, len(rows.mask)):
            return FusedContext
    return GrowingContext if config.engine == "plain" else FixedContext


def head_of(model: Model, config: DrawConfig, name: str, rows: Rows):
    """A vocabulary's head, or its steps through kernels where they pay."""
    head = getattr(model, f"{name}_head")
    if config.engine == "graph" and kernels_at_hand(model.device):
        from dualtoken.generation.fused_head import FusedHead, fits

        if fits(head, len(rows.mask)) and not torch.is_autocast_enabled("cuda"):
            return FusedHead(head)
    return head


def chooser(model: Model, config: DrawConfig) -> Choose:
    """What guides and samples: as one kernel where steps are recorded as they are."""
    if config.engine == "graph" and kernels_at_hand(model.device):
        from dualtoken.generation.fused_sampling import WIDEST, sample_gpu

        if max(getattr(model.config, f"{name}_head")["codebook_size"] for name in ("pixel", "semantic")) <= WIDEST:
            return sample_gpu
    return choose


def steps_of(drawing: Drawing) -> Callable[[], None]:
    """What draws one more position, by the engine: each call is a whole step.

    "graph" and "compiled" record it as a CUDA graph after a few positions, so that the processor has one launch a
    position in place of hundreds; off the GPU there is nothing to record.
    """
    if drawing.config.engine == "compiled":
        for piece in ("_read", "_choose_by"):
            setattr(drawing, piece, torch.compile(getattr(drawing, piece), dynamic=False))
    if drawing.config.engine in RECORDED and drawing.at.is_cuda:
        return Recorded(drawing.advance)
    return drawing.advance


class Recorded:
    """A step without arguments and results, played from a CUDA graph after some calls have been made as they are."""

    def __init__(self, step: Callable[[], None]):
        self.step, self.calls, self.graph, self.aside = step, 0, None, torch.cuda.Stream()

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= WARM_UP:
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                self.step()
            torch.cuda.current_stream().wait_stream(self.aside)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            own = {"stream": self.aside, "capture_error_mode": "thread_local"}  # torch's is of the GPU it met first
            with ONE_AT_A_TIME, torch.cuda.graph(self.graph, **own):  # recorded, not run
                self.step()
        self.graph.replay()


class Keep:
    """Of a model the drawing that was recorded last: what it was made for, itself, its step. A copy has none."""

    def __init__(self):
        self._last: list[tuple[tuple, Drawing, Callable[[], None]]] = []

    def take(self, key: tuple) -> tuple[Drawing, Callable[[], None]] | None:
        """What was made for the key, if it is there; nothing is left here, so that no one else draws with it."""
        try:
            found, *last = self._last.pop()
        except IndexError:
            return None
        return tuple(last) if found == key else None

    def put(self, key: tuple, drawing: Drawing, step: Callable[[], None]) -> None:
        """Keep this one, and no other."""
        self._last[:] = [(key, drawing, step)]

    def __deepcopy__(self, memo: dict) -> "Keep":
        return Keep()

    def __reduce__(self) -> tuple:
        return Keep, ()


def kept_by(model: Model) -> Keep:
    """What a model keeps; `kept_by(model).take(())`, then gc.collect(), frees the room of the last recorded drawing."""
    return vars(model).setdefault("_recorded", Keep())


def recorded_for(model: Model, config: DrawConfig) -> tuple:
    """What a recording holds on to, as it is now: settings, addresses of weights, adapters at work, torch's mode."""
    adapters = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    return (
        repr(config), model.config.output, model.llm.config._attn_implementation,
        tuple((m.training, *m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()),
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled(),
        # fp32_precision is there from torch 2.9 on; where it was set, the older question raises.
        getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers())),
        tuple((m.disable_adapters, *m.active_adapters, *getattr(m, "merged_adapters", ()),
               *getattr(m, "scaling", {}).items()) for m in adapters),
    )  # fmt: skip


def drawing_of(
    model: Model, rows: Rows, copies: int, config: DrawConfig, seeds: list[int]
) -> tuple[Drawing, Callable[[], None], Callable[[], None]]:
    """A drawing ready to begin, its step, and what is called when it is done.

    A recorded one is kept with its model, and taken again for as many images of prompts that fit into the same room.
    """
    if config.engine not in RECORDED or not rows.embeds.is_cuda:
        drawing = Drawing(model, rows, copies, config, seeds)
        return drawing, steps_of(drawing), lambda: None
    room = room_for(rows.mask.shape[1], model.config.positions - 1)
    key = (len(seeds), copies, room, rows.embeds.dtype, *recorded_for(model, config))
    keep = kept_by(model)
    if (known := keep.take(key)) is not None:
        drawing, step = known
        drawing.restart(rows, seeds)
    else:
        drawing = Drawing(model, rows, copies, deepcopy(config), seeds)
        step = steps_of(drawing)
    kept = not torch.is_autocast_enabled("cuda")  # whose 16-bit copies of weights do not outlive it
    return drawing, step, lambda: keep.put(key, drawing, step) if kept else None


@torch.no_grad()
def draw(
    model: Model,
    contexts: list[Context],
    unconditional: list[Context] | None,
    config: DrawConfig,
    seeds: list[int],
    callback: Callable[[int, int], None] | None = None,
    watch: Callable[[DualCodes], None] | None = None,
) -> DualCodes:
    """Draw one image for each context [B].

    Args:
        contexts: what stands before `<image_gen_start>`; unconditional: the same without text, for guidance.
        seeds: B numbers; equal seed and context give an equal image, alone or in any batch, but for rounding: in 16
            bits on a GPU few rows and many are computed by other kernels.
        callback: called with (positions done, N); on a GPU the work behind may still be under way.
        watch: called after every position with the codes so far, [B, n, D]; what it raises ends the drawing.
    Returns: codes of B images, [B, N, D] each. Raises UserError where the image does not fit the context, and where
        guidance is asked for without `unconditional`.
    """
    config, guided = engine_of(model, config), config.guidance != 1.0
    if guided and unconditional is None:
        raise UserError(
            "guidance needs the prompt without its text: make inputs with processor.apply_chat_template, or use "
            "guidance 1"
        )
    settings = model.config
    batch = [c.extend([settings.draw_start_id]) for c in (*contexts, *(unconditional if guided else ()))]
    rows = join(model, batch, settings.positions, draws_semantic(model, config))
    with torch.cuda.device(rows.embeds.device) if rows.embeds.is_cuda else nullcontext():  # streams are of its own
        drawing, step, keep = drawing_of(model, rows, len(batch) // len(contexts), config, seeds)
        for position in range(settings.positions):
            drawing.begin() if position == 0 else step()
            if callback is not None:
                callback(position + 1, settings.positions)
            if watch is not None:
                watch(DualCodes(*(drawing.codes[name][:, : position + 1].clone() for name in ("pixel", "semantic"))))
    codes = DualCodes(drawing.codes["pixel"].clone(), drawing.codes["semantic"].clone())
    keep()
    return codes
