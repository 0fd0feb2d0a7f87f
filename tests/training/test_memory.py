"""Memory of a stage, computed from shapes."""

import torch

from dualtoken.mllm.presets import SHAPES
from dualtoken.training.memory import lora_parameters, stage_memory
from dualtoken.training.stages import STAGES, Stage, set_trained
from tests import tiny


def test_weights_gradients_and_moments_are_what_training_holds():
    model, _ = tiny.mllm()
    stage = Stage({"projector": 1e-3, "llm": 1e-3}, 4, {"caption": 1.0})
    found = stage_memory(model, stage, tokens=64, drawn=8)
    learning = [p for group in set_trained(model, stage).values() for p in group]
    optimizer = torch.optim.AdamW(learning)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(v.numel() * 4 for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert found.training == moments + sum(p.numel() * 4 for p in learning)
    model.vision_tokenizer.drop_tower()
    assert found.weights == sum(p.numel() * 4 for p in model.parameters() if p.is_floating_point())
    assert found.total == found.weights + found.training + found.activations


def test_adapters_are_counted_as_peft_makes_them():
    import peft

    model, _ = tiny.mllm()
    wanted = lora_parameters(model.llm.base_model, 4)
    adapted = peft.LoraModel(model.llm, peft.LoraConfig(r=4, target_modules="all-linear"), "default")
    assert wanted == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


def test_the_shapes_for_one_gpu_fit_into_24_gb_in_every_stage():
    for name, rank in (("gpu-0.5b", 0), ("gpu-1.5b", 64)):
        model = SHAPES[name].build()
        for stage in STAGES.values():
            samples = -(-stage.batch_size // 64)
            assert stage_memory(model, stage, samples * 384, samples * 256, rank).total < 22 * 2**30
    whole = stage_memory(model, STAGES["4-1"], 8 * 384, 8 * 256).total
    assert whole > 24 * 2**30  # why the larger one has adapters
