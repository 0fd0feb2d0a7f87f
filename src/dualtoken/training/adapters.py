"""Low-rank adapters in the LLM, on weights as they are or quantised ones."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dualtoken.core.errors import UserError
from dualtoken.training.stages import LoraConfig


def add_adapters(llm: nn.Module, lora: LoraConfig) -> Any:
    """Put low-rank adapters (peft) into the LLM, which stays the object that it is; returns what merges them."""
    try:
        import peft
    except ImportError:
        raise UserError("--lora.rank needs peft: pip install 'dualtoken[lora]'") from None
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets
    )
    return peft.LoraModel(llm, settings, "default")


def in_full(llm: nn.Module, whole: str) -> nn.Module:
    """The LLM with the weights that it had before they were quantised, and what its adapters learnt added to them."""
    found = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    found.generation_config = llm.generation_config
    for name, module in llm.named_modules():
        if hasattr(module, "get_delta_weight"):
            found.get_submodule(name).weight.data += module.get_delta_weight("default").float().cpu()
    return found
