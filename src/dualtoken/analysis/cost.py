"""What a model takes: parameters, operations, memory, time; one vocabulary against two (paper Table 11, appendix D).

A model on the meta device has shapes and no values: operations and memory of the paper's sizes are counted on any
machine, in seconds. Only time needs values.

Shapes: B batch, T text, N positions, D depth, C width of the tokenizer, H width of the LLM.
"""

import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from dualtoken.core.errors import UserError
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.projector import two_layers
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

Token = Literal["single", "dual"]  # pixel codes alone, or both vocabularies


@dataclass(frozen=True)
class Cost:
    """What a call takes.

    flops: operations of matrix products and convolutions, two for each multiplication with its addition.
    memory: bytes of weights and of all tensors of the call that are alive at once.
    seconds: median of the repetitions; None on the meta device.
    """

    parameters: int
    flops: int
    memory: int
    seconds: float | None


def measure(call: Callable[[], Any], modules: Iterable[nn.Module], repeats: int = 5) -> Cost:
    """Count and time a call; `modules` are those whose weights it uses. The call must be repeatable."""
    weights = {id(p): p for module in modules for p in (*module.parameters(), *module.buffers())}
    kinds = {p.device.type for p in weights.values()}
    parameters = sum(p.numel() for p in weights.values() if isinstance(p, nn.Parameter))
    with ExitStack() as stack:
        # The same sums on every device: fused attention of some kernels is not counted
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        call()
    memory = _cuda_memory(call) if "cuda" in kinds else _memory(call, weights.values())
    seconds = None if "meta" in kinds else statistics.median(_seconds(call, "cuda" in kinds) for _ in range(repeats))
    return Cost(parameters, counter.get_total_flops(), memory, seconds)


def _seconds(call: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cuda_memory(call: Callable[[], Any]) -> int:
    """Peak of the allocator, weights included, and whatever else the process holds on the device."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def _memory(call: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    alive = AliveTensors(weights)
    with alive:
        call()
    return alive.peak


class AliveTensors(TorchDispatchMode):
    """Adds up the memory of tensors as they come and go, on any device; `peak` is the most there was, in bytes.

    Args: weights: what is there before.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storages; views share one
        for tensor in weights:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def learning(modules: Iterable[nn.Module], yes: bool) -> Iterator[None]:
    """All weights of some modules learn, or none does, until the block ends."""
    before = {p: p.requires_grad for module in modules for p in module.parameters()}
    for parameter in before:
        parameter.requires_grad_(yes)
    try:
        yield
    finally:
        for parameter, one in before.items():
            parameter.requires_grad_(one)


@torch.no_grad()
def tokenizer_costs(tokenizer: DualTokenVisionTokenizer, batch: int = 1, repeats: int = 5) -> dict[str, Cost]:
    """The bare backbone up to the semantic layer, encoding, and what the codes are used for, of B images."""
    backbone, pixel, semantic = tokenizer.backbone, tokenizer.pixel, tokenizer.semantic
    at = {"device": tokenizer.device, "dtype": tokenizer.dtype}
    images = torch.zeros(batch, 3, tokenizer.image_size, tokenizer.image_size, **at)
    features = torch.zeros(batch, tokenizer.positions, backbone.width, **at)
    deep = torch.zeros(batch, backbone.prefix + tokenizer.positions, backbone.width, **at)
    encoders = [part for part in (backbone, tokenizer.pixel_encoder, pixel, semantic) if part is not None]
    calls: dict[str, tuple[Callable[[], Any], list[nn.Module]]] = {
        "backbone to the semantic layer": (lambda: backbone.taps(images, (backbone.semantic_layer,)), [backbone]),
        "encode up to the code vectors": (lambda: _code_vectors(tokenizer, images), encoders),
        "encode": (lambda: tokenizer.encode(images), encoders),
        "decode from pixel features": (lambda: tokenizer.decoder(features), [tokenizer.decoder]),
        "pool semantic features": (lambda: tokenizer.pool(deep), [backbone]),
    }
    if images.is_meta:
        del calls["encode"]  # quantisers switch autocast off, which the meta device does not know
    with learning([tokenizer], False):
        return {name: measure(call, used, repeats) for name, (call, used) in calls.items()}


def _code_vectors(tokenizer: DualTokenVisionTokenizer, images: Tensor) -> None:
    """What `encode` does before it looks for the nearest codes."""
    pixel, shortcut, semantic = tokenizer._taps(images)
    tokenizer.pixel.latent(pixel, shortcut)
    tokenizer.semantic.latent(semantic)


class TeacherForced:
    """The model on a prompt of T tokens and one picture that is drawn after it, all codes given.

    Args: token: "single" is the model that a tokenizer of one vocabulary would have: half the projector's input and
        one head (appendix D). Its projector is made here, of no particular weights.
    """

    def __init__(self, model: DualTokenForConditionalGeneration, token: Token, text: int = 64, batch: int = 1):
        self.model, self.token = model, token
        self.names = ("pixel",) if token == "single" else ("pixel", "semantic")
        weight = next(model.llm.parameters())
        self.at = {"device": weight.device, "dtype": weight.dtype}
        hidden, width, positions = model.config.text_config.hidden_size, model.feature_width, model.config.positions
        self.projector = model.projector
        if token == "single":
            with torch.device(weight.device):
                norm = nn.LayerNorm(width)
                self.projector = nn.Sequential(norm, two_layers(width, hidden, hidden)).to(weight.dtype)
        self.ids = torch.zeros(batch, text, dtype=torch.int64, device=weight.device)
        widths = [width] if token == "single" else model.projector.widths
        self.features = [torch.zeros(batch, positions, one, **self.at) for one in widths]
        # None = causal; but transformers would look into positions for packed samples, and meta tensors hold none
        length, lowest = text + positions, torch.finfo(weight.dtype).min
        self.mask = torch.full((1, 1, length, length), lowest, **self.at).triu(1) if weight.is_meta else None
        depths = {name: getattr(model, f"{name}_head").config.depth for name in self.names}
        self.codes = {name: self.ids.new_zeros(batch * positions, depth) for name, depth in depths.items()}

    @property
    def modules(self) -> list[nn.Module]:
        """Whose weights a pass uses."""
        return [self.model.llm, self.projector, *(getattr(self.model, f"{name}_head") for name in self.names)]

    def states(self) -> Tensor:
        """The states that predict the positions, [B * N, H]."""
        model, given = self.model, self.features
        embeds = torch.cat([model.get_input_embeddings()(self.ids), self.projector(*given)], 1)
        out = model.hidden(embeds, attention_mask=self.mask, use_cache=False).last_hidden_state
        text = self.ids.shape[1]
        return out[:, text - 1 : -1].flatten(0, 1)

    @torch.no_grad()
    def forward(self) -> None:
        """Logits of all depths of all positions."""
        states = self.states()
        for name in self.names:
            getattr(self.model, f"{name}_head")(states, self.codes[name])

    def train(self) -> None:
        """A step without the optimizer: the loss of eq. 7, and gradients of all weights used, which are then let go."""
        states = self.states()
        loss = sum(getattr(self.model, f"{name}_head").loss(states, self.codes[name]).sum() for name in self.names)
        loss.backward()
        for module in self.modules:
            module.zero_grad(set_to_none=True)


def check_both(model: DualTokenForConditionalGeneration | None) -> None:
    """Raise UserError for a model that draws with one vocabulary: drawn once more with both, it takes the same."""
    if model is not None and model.config.output != "both":
        raise UserError(
            f"the model draws {model.config.output} codes alone (model.output), so it has no second vocabulary to "
            "compare with: give one that draws both, or its tokenizer alone"
        )


def mllm_costs(
    model: DualTokenForConditionalGeneration, text: int = 64, training: bool = False, repeats: int = 5
) -> dict[str, dict[Token, Cost]]:
    """What one vocabulary and two take: by kind of pass, then by "single" and "dual".

    Args: text: T, tokens of the prompt; training: also a step with gradients, of weights that all learn.
    Raises UserError as `check_both`.
    """
    check_both(model)
    found: dict[str, dict[Token, Cost]] = defaultdict(dict)
    for token in ("single", "dual"):
        passes = TeacherForced(model, token, text)
        with learning([model, passes.projector], False):
            found["forward of a prompt and a picture"][token] = measure(passes.forward, passes.modules, repeats)
            if not next(model.llm.parameters()).is_meta:
                found["drawing one picture"][token] = _drawing(model, token, text, repeats)
        if training:
            with learning(passes.modules, True):
                step = measure(passes.train, passes.modules, repeats)
            found["training step, gradients included"][token] = step
    return dict(found)


def _drawing(model: DualTokenForConditionalGeneration, token: Token, text: int, repeats: int) -> Cost:
    """A picture position by position, with guidance, as `generate` draws it."""
    config = model.draw_config
    config.semantic_codes = token == "dual"
    ids = torch.zeros(1, text, dtype=torch.int64, device=model.device)
    options = {"generation_mode": "image", "draw": config, "unconditional_ids": ids[:, -2:]}
    parts = TeacherForced(model, token, text).modules
    tokenizer = model.vision_tokenizer
    branches = [tokenizer.pixel] if token == "single" else [tokenizer.pixel, tokenizer.semantic]
    return measure(lambda: model.generate(ids, **options), [*parts, *branches], repeats)


def ratio(costs: dict[Token, Cost], of: str) -> float | None:
    """Dual over single of a field of `Cost`, None where it was not measured."""
    single, dual = (getattr(costs[token], of) for token in ("single", "dual"))
    return dual / single if single else None
