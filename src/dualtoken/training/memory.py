"""How much memory a stage of MLLM training takes, computed from shapes: what a GPU must hold, and what fits.

Weights are kept in float32 under autocast, so each parameter takes 4 bytes, and one that learns 12 more: its gradient
and AdamW's two moments. Activations are those of a bf16 pass with gradient checkpointing: the input of every block,
and all of one block while it is computed again. Code that libraries hold (about 1 GiB on CUDA) comes on top.
"""

from dataclasses import dataclass

from torch import nn

from dualtoken.core.linear_loss import CHUNK
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.training.stages import Stage, part_of

ANSWERED = 0.5  # share of the tokens of a batch that are text labels: a generous guess
LOGIT = 12  # bytes of a logit while it is used: itself, its log-softmax and its gradient in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage."""

    learning: int  # parameters that learn
    weights: int
    training: int  # gradients and moments
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.training + self.activations


def stage_memory(
    model: DualTokenForConditionalGeneration, stage: Stage, tokens: int, drawn: int, lora_rank: int = 0
) -> Memory:
    """What a stage takes on one device without sharding; the model may be on the meta device.

    Args:
        tokens, drawn: text and image tokens, and drawn positions, of one accumulated batch.
        lora_rank: of the adapters in place of the LLM's own weights.
    """
    held = [model.llm, model.projector, model.pixel_head, model.semantic_head]
    held += [part for branch in (model.vision_tokenizer.pixel, model.vision_tokenizer.semantic)
             for part in (branch.quantizer, branch.post)]  # fmt: skip
    parameters = sum(p.numel() for module in held for p in module.parameters())
    learning = sum(p.numel() for name, p in model.named_parameters() if part_of(name) in stage.trains)
    if lora_rank and "llm" in stage.trains:
        adapters = lora_parameters(model.llm.base_model, lora_rank)
        learning += adapters - sum(p.numel() for p in model.llm.parameters())
        parameters += adapters
    llm = model.config.text_config
    block = tokens * 2 * (8 * llm.hidden_size + 3 * llm.intermediate_size)
    activations = llm.num_hidden_layers * tokens * llm.hidden_size * 2 + block
    logits = [int(ANSWERED * tokens) * llm.vocab_size]
    for head in (model.config.pixel_head, model.config.semantic_head):
        activations += drawn * head["depth"] * head["width"] * 2 * 20 * head["layers"]
        logits.append(drawn * head["codebook_size"])
    activations += LOGIT * min(max(logits), CHUNK)  # one classifier after the other, a chunk of its logits at a time
    return Memory(learning, 4 * parameters, 12 * learning, activations)


def lora_parameters(module: nn.Module, rank: int) -> int:
    """Parameters of low-rank adapters at every linear layer of a module."""
    return sum(rank * (m.in_features + m.out_features) for m in module.modules() if isinstance(m, nn.Linear))
