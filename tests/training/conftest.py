"""What several tests of training begin with."""

import pytest
import torch

from dualtoken.mllm.parts import ModelConfig, SmallLLMConfig, from_parts, small_llm
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.training import mllm
from dualtoken.training.loop import Loop
from tests import tiny


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Directory of a model to start from, with a text tokenizer that has learnt the scenes' words."""
    content = tiny.mllm_recipe()
    torch.manual_seed(5)
    small = small_llm(
        mllm.scene_texts(mllm.SceneChatConfig(**content["data"]["scenes"]), 20), SmallLLMConfig(**content["small"])
    )
    head = VisualHeadConfig(**content["model"]["head"])
    model, processor = from_parts(content["vision_tokenizer"], *small, ModelConfig(head=head))
    place = tmp_path_factory.mktemp("start")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture
def watched(monkeypatch):
    """The model at every step of a run in this process, and its gradients at the first."""
    seen = {"steps": 0, "gradients": {}, "towers": set(), "batches": []}
    counts, check = mllm._counts, Loop.check

    def spy(model, parts):
        seen["model"], seen["steps"] = model, seen["steps"] + 1
        seen["towers"].add(model.vision_tokenizer.backbone)
        seen["batches"] += parts
        seen["learns"] = {name for name, p in model.named_parameters() if p.requires_grad}
        return counts(model, parts)

    def stop(self, step, parts):
        if step == 0:
            grads = {n: p.grad for n, p in seen["model"].named_parameters() if p.grad is not None}
            seen["gradients"] = {n: g.clone() for n, g in grads.items()}
        return check(self, step, parts)

    monkeypatch.setattr(mllm, "_counts", spy)
    monkeypatch.setattr(Loop, "check", stop)
    return seen


@pytest.fixture
def cut(monkeypatch):
    """Runs end with an error after step 3, one behind the last state."""

    def begin():
        record = Loop.log

        def stop(self, step, values):
            record(self, step, values)
            if step == 2:
                raise RuntimeError("power cut")

        monkeypatch.setattr(Loop, "log", stop)

    yield begin
    monkeypatch.undo()
