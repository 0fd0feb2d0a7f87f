"""Multimodal models by name: the bundled miniature, and the paper's sizes."""

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Qwen2Config

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.mllm.model import DualTokenConfig, DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, model_config
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.presets import BUNDLED
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

# The LLMs of the paper as published (Qwen2.5-3B and -7B); their weights are not needed to count parameters.
QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "eos_token_id": 151645}
PAPER_LLMS = {
    "paper-3b": QWEN | {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "paper-7b": QWEN | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def paper_model(name: str) -> DualTokenForConditionalGeneration:
    """A model of the paper at 256 px (SigLIP-L/16, D = 4) on the meta device: shapes without values."""
    branch = asdict(BranchConfig(QuantizerConfig(codebook_size=16384, code_dim=32, depth=4)))
    vision = DualTokenVisionConfig({"name": "vit_large_patch16_siglip_256"}, branch, branch)
    with torch.device("meta"):
        tokenizer = DualTokenVisionTokenizer(vision)
        config = model_config(tokenizer, Qwen2Config(**PAPER_LLMS[name]), ModelConfig(), {})
        return DualTokenForConditionalGeneration(config, vision_tokenizer=tokenizer)


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
