"""How much memory a stage of MLLM training takes: what a device must hold, and what fits.

Weights are kept in float32 under autocast, so each parameter takes 4 bytes, and one that learns 12 more: its gradient
and AdamW's two moments. Activations are counted, not guessed: a step's passes run on tensors that have shapes and no
values (PyTorch's fake tensors), for one and for two layers of the LLM, and each further layer adds as much as the
second. What libraries hold (about 1 GiB on CUDA) and what an allocator wastes come on top.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dualtoken.analysis.cost import AliveTensors
from dualtoken.core.linear_loss import CHUNK, classification_loss
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import DualTokenForConditionalGeneration, build_projector
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
from dualtoken.training.stages import Stage, part_of, recompute_activations

LOGIT = 12  # bytes of a logit while it is used: itself, its log-softmax and its gradient in float32


@dataclass(frozen=True)
class BatchShape:
    """What a device works on at once: one of a step's accumulated batches.

    Args:
        rows, length: of packed ids.
        pictures: in it, to look at and drawn.
        drawn: of them; each predicts its positions.
        labels: text tokens to be learnt.
        masked: attention needs a mask of packed samples, which flash attention does without.
    """

    rows: int
    length: int
    pictures: int
    drawn: int
    labels: int
    masked: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage on one device."""

    learning: int  # parameters that learn, on all devices together
    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int  # at once, part of the activations

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.moments + self.activations


def stage_memory(
    model: DualTokenForConditionalGeneration,
    stage: Stage,
    batch: BatchShape,
    lora_rank: int = 0,
    checkpointing: bool = True,
    precision: str = "bf16",
    devices: int = 1,
    shard: bool = False,
    looks: bool = False,
) -> Memory:
    """What a stage takes on each of some devices; the model may be on the meta device.

    Args:
        looks: pictures are encoded in training, so that the whole vision tokenizer is on the device; what encoding
            itself takes for a moment is left out.
        lora_rank: of the adapters in place of the LLM's own weights.
        devices, shard: with `shard` weights, gradients and moments are split (FSDP2), else each device has all.
    """
    tokenizer = model.vision_tokenizer
    held = [part for branch in (tokenizer.pixel, tokenizer.semantic) for part in (branch.quantizer, branch.post)]
    held = [tokenizer] if looks else held
    frozen = sum(p.numel() for module in held for p in module.parameters())
    own = {name: p.numel() for name, p in model.named_parameters() if part_of(name) is not None}
    learns = {name: size for name, size in own.items() if part_of(name) in stage.trains}
    parameters, learning = sum(own.values()), sum(learns.values())
    if lora_rank and "llm" in stage.trains:
        adapters = lora_parameters(model.llm.base_model, lora_rank)
        learning += adapters - sum(p.numel() for p in model.llm.parameters())
        parameters += adapters
    activations = count_activations(model.config, model.feature_width, stage, batch, checkpointing, precision)
    split = devices if shard else 1
    gradients = 4 * learning // split
    if shard:  # layers are gathered one by one; embeddings, projector and heads stay gathered during a pass
        layers = sum(size for name, size in own.items() if ".layers." in name)
        gathered = parameters - layers + layers // model.config.text_config.num_hidden_layers
        activations += gathered * (2 if precision == "bf16" else 4) * (split > 1)
    elif devices > 1:
        gradients *= 2  # DDP's buckets
    sizes = batch.labels * model.config.text_config.vocab_size, *_codes(model.config, batch)
    logits = LOGIT * min(max(sizes), CHUNK)
    return Memory(learning, 4 * (parameters // split + frozen), gradients, 8 * learning // split, activations, logits)


def _codes(config: DualTokenConfig, batch: BatchShape) -> list[int]:
    """Logits of one depth of each head."""
    return [
        batch.drawn * config.positions * head["codebook_size"] for head in (config.pixel_head, config.semantic_head)
    ]


def lora_parameters(module: nn.Module, rank: int) -> int:
    """Parameters of low-rank adapters at every linear layer of a module."""
    return sum(rank * (m.in_features + m.out_features) for m in module.modules() if isinstance(m, nn.Linear))


def count_activations(
    config: DualTokenConfig, width: int, stage: Stage, batch: BatchShape, checkpointing: bool, precision: str
) -> int:
    """The most bytes that a step's passes hold beside weights and gradients, with adapters as with the whole LLM.

    Args: width: C, of the tokenizer's features.
    """
    peaks = [_peak(config, width, stage, batch, checkpointing, precision, layers) for layers in (1, 2)]
    if not stage.through_llm:  # then no layer keeps anything
        return peaks[1]
    return peaks[0] + (config.text_config.num_hidden_layers - 1) * (peaks[1] - peaks[0])


def _peak(
    config: DualTokenConfig,
    width: int,
    stage: Stage,
    batch: BatchShape,
    checkpointing: bool,
    precision: str,
    layers: int,
) -> int:
    text = deepcopy(config.text_config)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with FakeTensorMode():
        parts = _Parts(config, width, text)
        for name, parameter in parts.named_parameters():
            if parameter.requires_grad_(part_of(name) in stage.trains).requires_grad:
                parameter.grad = torch.empty_like(parameter)
        if checkpointing:
            recompute_activations(parts, stage)
        before = [t for p in parts.parameters() for t in (p, p.grad) if t is not None] + list(parts.buffers())
        with AliveTensors(before) as alive:
            start = alive.now
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = parts(batch)
            if loss.requires_grad:
                loss.backward()
        return alive.peak - start


class _Parts(nn.Module):
    """A model's parts that a step uses, and the step without what depends on values: which ids are pictures."""

    def __init__(self, config: DualTokenConfig, width: int, text: PreTrainedConfig):
        super().__init__()
        self.config, hidden = config, text.hidden_size
        self.projector = build_projector(config, width)
        self.llm = AutoModelForCausalLM.from_config(text).train()
        self.pixel_head = VisualHead(hidden, VisualHeadConfig(**config.pixel_head))
        self.semantic_head = VisualHead(hidden, VisualHeadConfig(**config.semantic_head))

    def forward(self, batch: BatchShape) -> Tensor:
        positions = self.config.positions
        embeds = self.llm.get_input_embeddings()(torch.zeros(batch.rows, batch.length, dtype=torch.int64))
        if batch.pictures:
            features = (torch.zeros(batch.pictures, positions, width) for width in self.projector.widths)
            places = torch.zeros(batch.pictures * positions, dtype=torch.int64)
            seen = self.projector(*features).flatten(0, 1).to(embeds.dtype)
            embeds = embeds.flatten(0, 1).index_copy(0, places, seen).view_as(embeds)
        mask = torch.ones(batch.rows, 1, batch.length, batch.length, dtype=torch.bool) if batch.masked else None
        flat = self.llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        flat = flat.flatten(0, 1)
        labels = torch.zeros(batch.labels, dtype=torch.int64)
        classify = self.llm.get_output_embeddings()
        loss = classification_loss(classify, flat[labels], labels, self.config.text_config.vocab_size)
        if batch.drawn:
            states = flat[torch.zeros(batch.drawn * positions, dtype=torch.int64)]
            heads = [self.pixel_head, self.semantic_head][: 2 if self.config.output == "both" else 1]
            for head in heads:
                loss = loss + head.loss(states, torch.zeros(len(states), head.config.depth, dtype=torch.int64)).sum()
        return loss
