"""The bundled multimodal miniature: its files, and that it sees and draws."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dualtoken.eval.generation import draw_edits, draw_prompts, edit_all, judge_drawings, judge_edit
from dualtoken.eval.scene_reader import background, read_scene, shows
from dualtoken.eval.understanding import ask_questions, describe_scenes, draw_questions
from dualtoken.mllm.assistant import Assistant
from dualtoken.mllm.presets import mllm_directory


@pytest.fixture(scope="module")
def assistant():
    return Assistant.open("mini")


def test_files_are_small_in_half_precision_and_of_no_machine():
    folder = mllm_directory("mini")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 32 * 2**20
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
    assert not any(name.startswith("vision_tokenizer.") for name in weights)  # it lies beside
    config = json.loads((folder / "config.json").read_text())
    assert config["tokenizer_path"] == "../tokenizer" and "/" not in config["text_config"].get("_name_or_path", "")


def test_it_sees(assistant):
    asked = [(i, q) for i, q in draw_questions(60, "probe", 3) if q.type in ("attribute", "compare")]
    found = ask_questions(assistant, asked, 60, "probe")
    right = {kind: sum(a.right for a in found if a.question.type == kind) for kind in ("attribute", "compare")}
    assert right["attribute"] >= 40 and right["compare"] >= 51  # 80 and 95 % measured; the commonest answers 21 and 75
    said = describe_scenes(assistant, 40, 40, "probe")
    assert said["background"].value >= 0.9 and said["color and shape of the main object"].value >= 0.9  # 99 %


def test_it_draws_what_was_asked(assistant):
    truths, prompts = draw_prompts(1, 32, "probe", 3)
    pictures = [np.asarray(several[0]) for several in assistant.draw(prompts, seed=0)]
    told = [(t, p) for t, p, prompt in zip(truths, pictures, prompts, strict=True) if "background" in prompt]
    assert np.mean([background(p) == t.background for t, p in told]) >= 0.8  # one in six by chance
    colors = [any(s.color == t.objects[0].color for s in read_scene(p)) for t, p in zip(truths, pictures, strict=True)]
    assert np.mean(colors) >= 0.8  # one in eight by chance
    named = [shows(p, t.objects[0].color, t.objects[0].shape) for t, p in zip(truths, pictures, strict=True)]
    assert np.mean(named) >= 0.85  # 96 % measured, one in 48 by chance


def test_it_draws_two_things_in_their_relation(assistant):
    truths, prompts = draw_prompts(2, 32, "probe", 3)
    pictures = [np.asarray(several[0]) for several in assistant.draw(prompts, seed=0)]
    found = judge_drawings("two", truths, prompts, pictures)
    assert found["two"].value >= 0.5  # 70 % measured


def test_it_edits_what_was_asked(assistant):
    asked = draw_edits(32, "probe", 3)
    pictures = edit_all(assistant, asked, assistant.model.draw_config, 32, 0)
    good = [judge_edit(edit, np.asarray(picture)).good for edit, picture in zip(asked, pictures, strict=True)]
    assert np.mean(good) >= 0.35  # 56 % measured
