"""Multimodal models by name: the bundled miniature, the paper's sizes, and sizes for one GPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, model_config
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.presets import BUNDLED, meta_tokenizer

QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "eos_token_id": 151645}


@dataclass(frozen=True)
class Shape:
    """A multimodal model by its sizes: the LLM as published, the vision tokenizer's shape by name, the heads."""

    llm: dict[str, Any]
    tokenizer: str
    recipe: str  # that trains it
    head: VisualHeadConfig = field(default_factory=VisualHeadConfig)

    def build(self) -> DualTokenForConditionalGeneration:
        """The model on the meta device: shapes without values."""
        tokenizer = meta_tokenizer(self.tokenizer)
        with torch.device("meta"):
            config = model_config(tokenizer, Qwen2Config(**self.llm), ModelConfig(head=self.head), {})
            return DualTokenForConditionalGeneration(config, vision_tokenizer=tokenizer)


SMALL_HEAD = VisualHeadConfig(width=1024, embed_dim=512)
SHAPES = {  # the paper's, and two for one GPU; weights are not needed to count parameters
    "paper-3b": Shape(QWEN | {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }, "siglip-l-256", "qwen2.5-3b"),
    "paper-7b": Shape(QWEN | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }, "siglip-l-256", "qwen2.5-7b"),
    "gpu-0.5b": Shape(QWEN | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }, "siglip2-b-256", "qwen2.5-0.5b", SMALL_HEAD),
    "gpu-1.5b": Shape(QWEN | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }, "siglip2-b-256", "qwen2.5-1.5b", SMALL_HEAD),
}  # fmt: skip


def mllm_directory(model: str, option: str = "--model") -> Path:
    """Directory of a multimodal model given by preset or path. Raises UserError where it holds none."""
    if model in BUNDLED:
        return BUNDLED[model] / "mllm"
    if not Path(model).exists():
        raise UserError(f"{option} {model}: no such directory, and no preset (presets: {', '.join(BUNDLED)})")
    return check_directory(model, option, DualTokenConfig.model_type)


def open_mllm(model: str, option: str = "--model") -> tuple[DualTokenForConditionalGeneration, DualTokenProcessor]:
    """Model and processor of a preset or directory, in evaluation mode."""
    directory = mllm_directory(model, option)
    return DualTokenForConditionalGeneration.from_pretrained(directory).eval(), DualTokenProcessor.from_pretrained(
        directory
    )
