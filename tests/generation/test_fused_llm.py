"""The LLM's layers as kernels against transformers', in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SCRIPT = """
import torch
from types import SimpleNamespace
from dualtoken.generation import fused_llm
from dualtoken.generation.fused_llm import FusedContext, fits
from dualtoken.generation.llm_cache import GrowingContext
from tests.generation.test_fused_llm import llm

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":  # smaller blocks, so that the loops go round several times; a GPU has the true ones
    fused_llm.BLOCK_L = 16
for kind, rows, prompt in (("qwen2", 3, 40), ("llama", 2, 5), ("qwen2", 1, 5)):
    made = llm(kind).to(device)
    hidden = lambda embeds, made=made, **more: made.base_model(inputs_embeds=embeds, **more)
    model = SimpleNamespace(llm=made, device=made.device, hidden=hidden)
    assert fits(model, rows) and not fits(model, 5)
    mask = torch.ones(rows, prompt, dtype=torch.int64, device=device)
    mask[0, : prompt - 2] = 0  # a shorter prompt, with whole blocks of nothing
    places = (mask.cumsum(1) - 1).clamp(min=0)
    context = FusedContext(model, mask, places, 4)
    for turn in range(2):  # the second begins anew in the same room
        growing = GrowingContext(model, mask, places, 4)
        context.restart(mask, places)
        for embeds in (torch.randn(rows, prompt, 32, device=device), *torch.randn(3, rows, 1, 32, device=device)):
            with torch.no_grad():
                torch.testing.assert_close(context.read(embeds), growing.read(embeds), atol=1e-5, rtol=1e-5)
"""


def llm(kind="qwen2", **changes):
    """Two layers of random weights; Llama's has no biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 20, "max_position_embeddings": 128}  # fmt: skip
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(Qwen2Config(**sizes | changes)) if kind == "qwen2" else LlamaForCausalLM(
        LlamaConfig(**sizes | changes)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


@pytest.mark.slow
def test_the_kernels_go_on_as_transformers_does():
    pytest.importorskip("triton")
    settings = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_other_llms_are_left_to_transformers():
    pytest.importorskip("triton")
    import peft

    from dualtoken.generation.fused_llm import fits

    class Holder:
        def __init__(self, made):
            self.llm, self.device = made, made.device

    assert fits(Holder(llm()), 2)
    assert not fits(Holder(llm(hidden_act="gelu")), 2)
    assert not fits(Holder(llm("llama", mlp_bias=True)), 2)
    assert not fits(Holder(llm(use_sliding_window=True, max_window_layers=1)), 2)
    assert not fits(Holder(llm(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})), 2)
    flash = llm()
    flash.config._attn_implementation = "flash_attention_2"
    assert not fits(Holder(flash), 2)
    hooked = llm()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not fits(Holder(hooked), 2)
    assert fits(Holder(llm(attention_dropout=0.1)), 2) and not fits(Holder(llm(attention_dropout=0.1).train()), 2)
    mixed = llm()
    mixed.model.layers[1].mlp.down_proj.to(torch.bfloat16)
    assert not fits(Holder(mixed), 2)
    adapted = peft.LoraModel(llm(), peft.LoraConfig(r=2, target_modules=["q_proj"]), "default").model
    assert not fits(Holder(adapted), 2)
