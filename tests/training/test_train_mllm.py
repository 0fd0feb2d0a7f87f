import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dualtoken.cli import main
from dualtoken.core.checkpoint import latest_state
from dualtoken.data.mixture import MixtureBatches
from dualtoken.data.scene_chat import SceneChatConfig, SceneChats
from dualtoken.mllm.model import Counts, DualTokenForConditionalGeneration
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.training import mllm, stored_codes
from dualtoken.training.loop import Loop
from dualtoken.training.stages import STAGES, Stage, StageOptim, part_of, set_trained
from tests import tiny
from tests.training.mllm_runs import NAMES, differing, error, evaluated, log, model_of, recipe, weights, write

TRAINS = {name: set(stage["trains"]) for name, stage in tiny.mllm_recipe()["recipe"].items()}
MIDDLE = 12  # steps of stage 2, long enough to be killed in


def whole(stages=NAMES):
    """Stages of which the second is a little longer."""
    given = tiny.mllm_recipe()["recipe"]
    return {name: given[name] | ({"steps": MIDDLE} if name == "2" else {}) for name in stages}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    """A run of all stages that was never stopped."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(write(folder, start, recipe=whole(), loop=evaluated())) == 0
    return folder


def test_the_stages_are_those_of_table_13():
    learnt = {name: (stage.trains, stage.batch_size) for name, stage in STAGES.items()}
    last = {"projector": 1e-5, "head_projectors": 1e-5, "heads": 1e-5, "llm": 1e-5}
    assert learnt == {
        "1": ({"projector": 1e-3}, 64),
        "2": ({"projector": 2e-5, "llm": 2e-5}, 256),
        "3": ({"head_projectors": 1e-4, "heads": 1e-4}, 128),
        "4-1": (last, 512),
        "4-2": (last, 256),
    }
    assert {name: set(stage.trains) for name, stage in STAGES.items()} == TRAINS  # so the runs below are of them


def piece(name):
    """The part of a tensor by its name, restated."""
    if name.startswith("vision_tokenizer."):
        return "vision tokenizer"
    if "_head.projector." in name:
        return "head_projectors"
    return name.split(".")[0] if name.startswith(("llm.", "projector.")) else "heads"


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_changes_all_of_its_parts_and_nothing_else(stage, start, finished):
    place = NAMES.index(stage)
    before = start if place == 0 else model_of(finished, NAMES[place - 1])
    changed = differing(before, model_of(finished, stage))
    assert changed == {name for name in weights(before) if piece(name) in TRAINS[stage]}


def test_every_parameter_has_a_part_but_the_vision_tokenizers():
    model, _ = tiny.mllm()
    for name, _ in model.named_parameters():
        assert part_of(name) == (None if name.startswith("vision_tokenizer.") else piece(name))


def test_a_run_logs_every_part_and_evaluates_unseen_chats(finished):
    lines = log(finished, "4-2")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"text", "pixel", "semantic", "useful", "norm", "lr"} <= set(lines[0]) and lines[0]["norm"] > 0
    assert {"eval_vqa_text", "eval_text_to_image_pixel", "eval_story_semantic"} <= set(lines[-1])
    depth = 2
    for line in (x for x in lines if "loss" in x):  # eq. 7 sums over depths
        assert line["loss"] == pytest.approx(line["text"] + depth * (line["pixel"] + line["semantic"]), abs=1e-4)


def test_a_written_model_opens_with_its_processor_and_works(finished):
    place = model_of(finished, "4-2")
    model = DualTokenForConditionalGeneration.from_pretrained(place)
    processor = DualTokenProcessor.from_pretrained(place)
    chat = [{"role": "user", "content": "draw a star"}]
    inputs = processor.apply_chat_template([chat], add_generation_prompt=True)
    codes = model.generate(**inputs, generation_mode="image")
    assert model.decode_image_tokens(codes).shape == (1, 3, tiny.SIZE, tiny.SIZE)
    assert not (place.parent / "model.draft").exists()


def test_killed_in_the_middle_of_a_stage_and_started_again_it_ends_the_same(tmp_path, start, finished, capsys):
    stages = NAMES[:3]
    command = [sys.executable, "-c", "import sys; from dualtoken.cli import main; sys.exit(main(sys.argv[1:]))"]
    process = subprocess.Popen(
        [*command, *write(tmp_path, start, recipe=whole(stages))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    states, deadline = tmp_path / "run/stage-2/states", time.time() + 300
    while time.time() < deadline and latest_state(states) is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not model_of(tmp_path, "2").exists() and latest_state(states)[1]["step"] < MIDDLE
    first = (model_of(tmp_path, "1") / "model.safetensors").stat().st_mtime_ns
    assert main(write(tmp_path, start, recipe=whole(stages))) == 0
    out = capsys.readouterr().out
    assert "stage 1 is done" in out and "going on from step" in out and "stage 2 is done" not in out
    assert (model_of(tmp_path, "1") / "model.safetensors").stat().st_mtime_ns == first
    for stage in stages:
        assert differing(model_of(tmp_path, stage), model_of(finished, stage)) == set()
        ours, theirs = ({x["step"]: x["loss"] for x in log(f, stage) if "loss" in x} for f in (tmp_path, finished))
        assert ours == theirs


def test_a_finished_run_is_passed_over_and_other_settings_refuse_to_go_on(start, finished, capsys):
    before = {stage: len(log(finished, stage)) for stage in NAMES}
    assert main(write(finished, start, recipe=whole())) == 0
    assert capsys.readouterr().out.count("is done") == len(NAMES)
    assert {stage: len(log(finished, stage)) for stage in NAMES} == before
    for option, value, word in (
        ("--optim.clip", "0.5", "optim"),
        ("--data.dropout.text", "0.5", "data"),
    ):
        assert main(write(finished, start, "--stage", "4-2", option, value, recipe=whole())) == 2
        assert f"its run has another {word}" in error(capsys)
    other = whole() | recipe("4-2", trains={"llm": 0.5})
    assert main(write(finished, start, "--stage", "4-2", recipe=other)) == 2
    assert "its run has another recipe" in error(capsys)
    assert main(write(finished, start, "--stage", "4-2", "--resume", "never", recipe=whole())) == 2
    assert "--resume auto" in error(capsys)


def test_which_stages_are_asked_for_is_no_other_setting(tmp_path, start, monkeypatch):
    stages = recipe("1") | recipe("2")
    record = Loop.log

    def stop(self, step, values):
        record(self, step, values)
        if self.output.name == "stage-2" and step == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Loop, "log", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        main(write(tmp_path, start, "--stages", "1, 2", recipe=stages))
    monkeypatch.undo()
    assert main(write(tmp_path, start, recipe=stages)) == 0
    assert [x["step"] for x in log(tmp_path, "2") if "loss" in x] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("stage", "rate", "steps", "bar"),
    [
        ("1", 0.03, 300, 0.5),
        ("2", 0.01, 40, 0.3),
        ("3", 0.01, 200, 0.3),
        ("4-1", 0.01, 40, 0.3),
        ("4-2", 0.01, 40, 0.3),
    ],
)
def test_one_batch_can_be_learnt_by_heart(stage, rate, steps, bar, start):
    """Steps on one batch bring the loss below `bar` times what it was, the text of frozen LLMs left out."""
    content = tiny.mllm_recipe()
    model = DualTokenForConditionalGeneration.from_pretrained(start)
    processor = DualTokenProcessor.from_pretrained(start)
    chats = SceneChats(SceneChatConfig(**content["data"]["scenes"]))
    pictures = [chats.pictures()[i] for i in range(len(chats.pictures()))]
    codes = stored_codes.encode_pictures(model.vision_tokenizer, pictures)
    stored = mllm.StoredCodes(codes, [p.name for p in pictures])
    batch = MixtureBatches(chats, STAGES[stage].mixture, processor.encode, 2, 256, 0, 0, stored)[0]
    if stage == "1":  # what a projector can teach a frozen LLM at random is little; let that LLM listen
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.llm.parameters():
                if p.ndim == 2:
                    p.normal_(std=0.3)
    model.config.text_weight = 0.0 if stage == "3" else 1.0
    groups = set_trained(model, Stage(dict.fromkeys(STAGES[stage].trains, rate), 4, STAGES[stage].mixture))
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p in groups.values()], weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch.inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < bar * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"


def test_accumulated_halves_make_the_step_of_the_whole_batch(tmp_path, start, watched):
    found = []
    for accumulate in (1, 2):
        loop = tiny.mllm_recipe()["loop"] | {"accumulate": accumulate}
        folder = tmp_path / str(accumulate)
        told = ("--stages", "4-1", "--seed", "1")  # a seed whose halves have unequal numbers of labels
        assert main(write(folder, start, *told, recipe=recipe("4-1", steps=1), loop=loop)) == 0
        found.append((watched["gradients"], log(folder, "4-1")[0]))
    (whole_grads, whole_line), (half_grads, half_line) = found
    labels = [int((b.labels >= 0).sum()) for b in watched["batches"][-2:]]
    assert labels[0] != labels[1]  # so a mean of two means would be another number
    assert whole_grads.keys() == half_grads.keys() and len(whole_grads) > 20
    for name, grad in whole_grads.items():
        assert grad.abs().max() > 0 and (grad - half_grads[name]).abs().max() < 1e-5
    for name in ("loss", "text", "pixel", "semantic"):
        assert half_line[name] == pytest.approx(whole_line[name], abs=1e-5)


def test_losses_of_parts_add_up_by_the_counts_of_the_step(start):
    model, processor = (
        DualTokenForConditionalGeneration.from_pretrained(start),
        DualTokenProcessor.from_pretrained(start),
    )
    chats = SceneChats(SceneChatConfig(scenes=12, stories=4))
    pictures = [chats.pictures()[i] for i in range(len(chats.pictures()))]
    stored = mllm.StoredCodes(
        stored_codes.encode_pictures(model.vision_tokenizer, pictures), [p.name for p in pictures]
    )
    drop = mllm.Dropout(0.0, 0.5)
    batches = MixtureBatches(chats, STAGES["4-1"].mixture, processor.encode, 4, 256, 0, 0, stored, drop)
    parts = [batches[i] for i in range(3)]
    counts = mllm._counts(model, parts)
    drawn = sum(s.draws for s in _samples(batches, 12))
    assert counts.text == sum(int((b.labels >= 0).sum()) for b in parts)
    assert 0 < counts.semantic < counts.drawn and drawn > 0 and isinstance(counts, Counts)
    with torch.no_grad():
        outs = [model(**b.inputs, counts=counts) for b in parts]
        own = [(model(**b.inputs), mllm._counts(model, [b])) for b in parts]
    for name, weight in (("text", "text"), ("pixel", "drawn"), ("semantic", "semantic")):
        mean = sum(getattr(o, name) * getattr(c, weight) for o, c in own) / getattr(counts, weight)
        assert torch.allclose(sum(getattr(o, name) for o in outs), mean, atol=1e-5)


def _samples(batches, count):
    found = []
    encode = batches.encode
    batches.encode = lambda sample, hide: found.append(sample) or encode(sample, hide)
    for i in range(count):
        batches._tokens(i)
    batches.encode = encode
    return found


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, start, watched):
    found = []
    for on in (False, True):
        loop = tiny.mllm_recipe()["loop"] | {"gradient_checkpointing": on}
        assert main(write(tmp_path / str(on), start, "--stages", "4-1", recipe=recipe("4-1", steps=1), loop=loop)) == 0
        assert watched["model"].llm.is_gradient_checkpointing == on
        found.append(watched["gradients"])
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all((found[0][n] - found[1][n]).abs().max() < 1e-6 for n in found[0])


def test_training_holds_no_vision_tower(tmp_path, start, watched):
    assert main(write(tmp_path, start, recipe=recipe("1"))) == 0
    assert watched["steps"] == 4 and watched["towers"] == {None}
    assert watched["model"].vision_tokenizer.backbone is not None  # back for the written model


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_captions_are_hidden_for_guidance(share, tmp_path, start, watched):
    both = recipe("4-1", mixture={"text_to_image": 0.7, "caption": 0.3}, steps=3)
    assert main(write(tmp_path, start, "--data.dropout.text", str(share), recipe=both)) == 0
    processor = DualTokenProcessor.from_pretrained(start)
    drawn, looked = [], []
    for batch in watched["batches"]:
        for ids, places in zip(batch.input_ids, batch.position_ids, strict=True):
            starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
            for a, b in itertools.pairwise(starts):
                sample = ids[a:b]
                if (sample == processor.draw_start_id).any():
                    drawn.append(processor.decode(sample))
                elif (sample == processor.image_id).any():
                    looked.append(processor.decode(sample))
    assert len(drawn) > 3 and len(looked) > 0
    assert len(set(drawn)) == 1 if share else len(set(drawn)) > 1  # without words one prompt is like the other
    assert all("picture" in text for text in looked)  # the words of what is only looked at stay


def test_a_stage_whose_parts_a_batch_does_not_touch_goes_on(tmp_path, start):
    stage = recipe("1", mixture={"text": 1.0})  # without pictures the projector has nothing to learn from
    assert main(write(tmp_path, start, recipe=stage)) == 0
    assert differing(start, model_of(tmp_path, "1")) == set()


# What a run starts from, and what it writes


def test_without_a_model_to_start_from_one_is_built(tmp_path, monkeypatch):
    texts = mllm.scene_texts
    monkeypatch.setattr(mllm, "scene_texts", lambda config: texts(config, 10))
    for name in ("a", "b"):
        assert main(write(tmp_path / name, None, recipe=recipe("1", steps=1))) == 0
    model = DualTokenForConditionalGeneration.from_pretrained(model_of(tmp_path / "a", "1"))
    assert model.config.text_config.hidden_size == 32 and model.context == 256
    assert differing(model_of(tmp_path / "a", "1"), model_of(tmp_path / "b", "1")) == set()  # one seed, one model


def test_a_single_stage_starts_from_the_stage_before(tmp_path, finished, start):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stage-2").symlink_to(finished / "run/stage-2")
    assert main(write(tmp_path, None, "--stage", "3", recipe=whole())) == 0
    assert differing(model_of(tmp_path, "3"), model_of(finished, "3")) == set()


def test_switches_of_the_recipe_go_into_the_written_model(tmp_path, start):
    content = tiny.mllm_recipe()["model"] | {"output": "pixel", "text_weight": 0.5}
    assert main(write(tmp_path, start, recipe=recipe("3"), model=content)) == 0
    config = json.loads((model_of(tmp_path, "3") / "config.json").read_text())
    assert config["output"] == "pixel" and config["text_weight"] == 0.5
    assert {piece(n).split(".")[0] for n in differing(start, model_of(tmp_path, "3"))} == {"head_projectors", "heads"}
    assert not any(n.startswith("semantic_head") for n in differing(start, model_of(tmp_path, "3")))


def test_no_unseen_chats_means_no_evaluation(tmp_path, start):
    data = tiny.mllm_recipe()["data"] | {"held_out": 0}
    loop = tiny.mllm_recipe()["loop"] | {"eval_every": 1}
    assert main(write(tmp_path, start, recipe=recipe("1", steps=2), data=data, loop=loop)) == 0
    assert not any("eval" in key for line in log(tmp_path, "1") for key in line)


def test_attention_of_the_llm_is_that_asked_for_in_later_stages_too(tmp_path, start, watched):
    options = {"attn_implementation": "eager"}
    assert main(write(tmp_path, start, recipe=recipe("2", steps=1), llm_options=options)) == 0
    assert watched["model"].llm.config._attn_implementation == "eager"


@pytest.mark.parametrize("inside", [True, False])
def test_models_can_be_written_in_16_bits_and_without_the_tokenizer(inside, tmp_path, start):
    stages = recipe("1", steps=1) | ({} if inside else recipe("2", steps=1))
    options = ["--dtype", "float16", "--write_tokenizer", str(inside).lower()]
    assert main(write(tmp_path, start, *options, recipe=stages)) == 0  # the second stage starts from such a model
    place = model_of(tmp_path, list(stages)[-1])
    stored = weights(place)
    assert {t.dtype for n, t in stored.items() if not n.startswith("vision_tokenizer.")} == {torch.float16}
    assert any(n.startswith("vision_tokenizer.") for n in stored) == inside
    model = DualTokenForConditionalGeneration.from_pretrained(place)
    assert model.dtype == torch.float32 and model.look(tiny.images()).pixel.shape == (2, 4, 2)
    assert DualTokenProcessor.from_pretrained(place).positions == 4


# Adapters


def test_rates_warm_up_and_decay():
    optim = StageOptim(warmup=0.1, final=0.2)
    factors = [optim.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 == max(factors)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert factors[-1] == pytest.approx(0.2, abs=1e-3)
