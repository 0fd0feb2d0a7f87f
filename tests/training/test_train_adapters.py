"""Stages of `train-mllm` that train adapters (LoRA) in place of the LLM."""

import sys

import pytest
import torch

from dualtoken.cli import main
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.training import mllm
from dualtoken.training.stages import part_of
from tests.training.mllm_runs import differing, error, evaluated, model_of, recipe, weights, write


def adapted(**changes):
    """A stage of the LLM alone, by adapters; options of the command."""
    return {"recipe": recipe("2", trains={"llm": 1e-2}), "lora": {"rank": 4, "alpha": 8} | changes}


def test_adapters_alone_learn_and_are_merged_into_the_written_model(tmp_path, start, watched, monkeypatch):
    pytest.importorskip("peft")
    found, real = {}, mllm.evaluate

    def spy(model, held_out, device):
        found.update(real(model, held_out, device))
        found["chats"] = held_out
        return {k: v for k, v in found.items() if k != "chats"}

    monkeypatch.setattr(mllm, "evaluate", spy)
    assert main(write(tmp_path, start, loop=evaluated(), **adapted())) == 0
    assert watched["learns"] and all("lora_" in n and n.startswith("llm.") for n in watched["learns"])
    changed = differing(start, model_of(tmp_path, "2"))  # the same names, so no adapter is left
    assert changed and all(n.startswith("llm.model.layers.") and n.endswith("proj.weight") for n in changed)
    model = DualTokenForConditionalGeneration.from_pretrained(model_of(tmp_path, "2"))
    again = real(model, found.pop("chats"), torch.device("cpu"))
    assert again == pytest.approx(found, abs=1e-4)  # merged, it says what it said with its adapters


@pytest.mark.parametrize("stage", ["2", "4-1", "4-2"])
def test_with_adapters_the_other_parts_of_a_stage_learn_as_ever(stage, tmp_path, start, watched):
    pytest.importorskip("peft")
    assert main(write(tmp_path, start, recipe=recipe(stage), lora={"rank": 2, "targets": ["q_proj"]})) == 0
    assert {part_of(n) for n in watched["learns"]} == set(recipe(stage)[stage]["trains"])
    changed = differing(start, model_of(tmp_path, stage))
    assert {n for n in changed if n.startswith("projector.")} == {
        n for n in weights(start) if n.startswith("projector.")
    }
    assert all(n.endswith("q_proj.weight") for n in changed if n.startswith("llm."))


def test_a_run_with_adapters_goes_on_to_the_same_weights(tmp_path, start, cut, monkeypatch):
    pytest.importorskip("peft")
    assert main(write(tmp_path / "whole", start, **adapted(dropout=0.1))) == 0
    cut()
    with pytest.raises(RuntimeError, match="power cut"):
        main(write(tmp_path / "cut", start, **adapted(dropout=0.1)))
    monkeypatch.undo()
    assert main(write(tmp_path / "cut", start, **adapted(dropout=0.1))) == 0
    assert differing(model_of(tmp_path / "whole", "2"), model_of(tmp_path / "cut", "2")) == set()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_llm_learns_by_adapters_alone_and_is_written_whole(bits, tmp_path, start, watched, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    few = {"quantization_config": {f"load_in_{bits}bit": True, "quant_method": "bitsandbytes"}}
    stages = recipe("2", trains={"llm": 1e-2}, steps=2) | recipe("4-1", steps=2)
    assert main(write(tmp_path / "none", start, recipe=stages, llm_options=few)) == 2
    assert "give --lora.rank" in error(capsys)
    assert main(write(tmp_path, start, recipe=stages, llm_options=few, lora={"rank": 4, "alpha": 8})) == 0
    assert any("lora_" in n for n in watched["learns"])
    for before, after in ((start, model_of(tmp_path, "2")), (model_of(tmp_path, "2"), model_of(tmp_path, "4-1"))):
        changed = {n for n in differing(before, after) if n.startswith("llm.")}  # the same names and shapes
        assert changed and all(n.endswith("proj.weight") for n in changed)
        step = [(weights(after)[n] - weights(before)[n]).abs().max() for n in changed]
        assert max(step) < 0.05  # the weights of before with what was learnt, not those of few bits
    model = DualTokenForConditionalGeneration.from_pretrained(model_of(tmp_path, "4-1"))
    assert not hasattr(model.config.text_config, "quantization_config")


def test_adapters_without_peft_are_a_mistake(tmp_path, start, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(write(tmp_path, start, **adapted())) == 2
    assert "--lora.rank needs peft" in error(capsys)
