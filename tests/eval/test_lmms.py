"""The model in lmms-eval, against stand-ins of its requests; with lmms-eval itself where it is installed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.data.scenes import scene
from dualtoken.eval import lmms
from dualtoken.eval.lmms import Answers, parts_of
from dualtoken.mllm.assistant import Assistant, user
from tests import tiny
from tests.generation.lively import lively

PICTURE = Image.new("RGB", (20, 16), "red")
DOCUMENTS = [{"picture": PICTURE, "question": "what is it ?", "answer": "a circle"}, {"picture": PICTURE}]

TASK = """
task: dualtoken_scenes
dataset_path: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def request(context, second, visuals=lambda document: [document["picture"]], number=0):
    return SimpleNamespace(args=(context, second, visuals, number, "task", "test"))


@pytest.fixture
def answers(tmp_path):
    model, processor = lively()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = Answers(str(tmp_path), "cpu", "2")
    found.task_dict = {"task": {"test": DOCUMENTS}}
    return found


def test_answers_are_those_of_the_assistant_cut_at_stop_words(answers):
    options = {"max_new_tokens": 6, "until": ["\n\n"], "temperature": 0, "image_aspect_ratio": "original"}
    asked = [request("what color ?", options), request("tell a story", options, None), request("is it ?", options)]
    found = answers.generate_until(asked)
    chats = [[user(PICTURE, "what color ?")], [user("tell a story")], [user(PICTURE, "is it ?")]]
    wanted = [answers.assistant.ask([chat], max_new_tokens=6)[0] for chat in chats]
    assert found == [text.split("\n\n")[0].strip() for text in wanted] and answers.failed == []
    assert len(set(wanted)) == 3  # it says something, and looks at what it is asked
    answers.assistant.ask = lambda chats, **options: ["blue, I think\n\nUser: why"] * len(chats)
    stops = ([], "\n\n", ["User", ","])
    found = answers.generate_until([request("what color ?", {"until": stop}) for stop in stops])
    assert found == ["blue, I think\n\nUser: why", "blue, I think", "blue"]


def test_what_the_model_cannot_take_is_counted_and_costs_no_other_answer(answers, capsys):
    options = {"max_new_tokens": 1000}
    long, good = request("red " * 500, options), request("what color ?", options)
    found = answers.generate_until([long, good, request("?", options, lambda document: ["film.mp4"])])
    assert found[0] == found[2] == "" and [found[1]] == answers.generate_until([good]) and len(answers.failed) == 2
    assert "2 of 3 requests got no answer" in capsys.readouterr().out
    assert any("pictures only" in why for why in answers.failed)


def test_a_damaged_picture_costs_its_own_answer_alone(answers, tmp_path, capsys):
    scene_of = Image.fromarray(scene(0, "test").render(64))
    scene_of.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    lazy = [request("what color ?", {"max_new_tokens": 4}, lambda document: [Image.open(tmp_path / "cut.png")])]
    turned = [request("is it ?", {}, lambda document: [Image.open(tmp_path / "cut.png").convert("RGB")])]
    good = [request("what color ?", {"max_new_tokens": 4})]
    found = answers.generate_until([*lazy, *good, *turned])
    assert found == ["", *answers.generate_until(good), ""] and found[1]
    assert "2 of 3 requests got no answer" in capsys.readouterr().out
    losses = [answers.loglikelihood([request("is it ?", "a", one.args[2])]) for one in (*lazy, *turned)]
    assert losses == [[(float("inf"), False)]] * 2 and len(answers.failed) == 4
    assert sum("document 0 of task" in why for why in answers.failed) == 2  # those that the task itself opens


def test_the_loss_of_a_continuation_is_that_of_its_tokens(answers):
    model, processor = answers.assistant.model, answers.assistant.processor
    choices = ["a red circle", "a blue star", lambda document: document["answer"]]
    found = answers.loglikelihood([request("what is it ?", choice) for choice in choices])
    chat = processor.apply_chat_template([[user(PICTURE, "what is it ?")]], add_generation_prompt=True)
    for (loss, _), text in zip(found, ("a red circle", "a blue star", "a circle"), strict=True):
        ids, by_hand = chat["input_ids"], []
        with torch.no_grad():
            for token in processor.tokenizer.encode(text, add_special_tokens=False):
                step = model(ids, pixel_values=chat["pixel_values"]).logits[0, -1].log_softmax(-1)
                by_hand.append(-float(step[token]))
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert loss == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    with torch.no_grad():
        likeliest = model(chat["input_ids"], pixel_values=chat["pixel_values"]).logits[0, -1].argsort(descending=True)
    texts = {int(t): processor.tokenizer.decode([int(t)]) for t in likeliest[:2]}
    back = {t: processor.tokenizer.encode(s, add_special_tokens=False) for t, s in texts.items()}
    for place, token in enumerate(texts):
        if back[token] == [token]:  # a byte that is no letter alone does not come back
            assert answers.loglikelihood([request("what is it ?", texts[token])])[0][1] == (place == 0)
    empty = answers.loglikelihood([SimpleNamespace(args=("", "a red circle"))])
    assert empty[0][0] > 0 and answers.loglikelihood([request("red " * 500, "a")]) == [(float("inf"), False)]


def test_pictures_stand_where_the_text_has_places_for_them():
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))
    assert parts_of("what is it ?", [one]) == [one, "what is it ?"]
    assert parts_of("<image>\nwhat is it ?", [one]) == [one, "what is it ?"]
    assert parts_of("is <image 1> like <image 2> ?", [one, two]) == ["is", one, "like", two, "?"]
    assert parts_of("is <image 1> like it, <image 1> ?", [one]) == [one, "is  like it,  ?"]
    assert parts_of("hello", []) == ["hello"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--batch_size auto"):
        Answers("mini", batch_size="auto")
    with pytest.raises(UserError, match="--model_args pretrained nowhere"):
        Answers("nowhere")


def test_lmms_eval_finds_the_model():
    pytest.importorskip("lmms_eval")
    from lmms_eval.models import get_model

    model = get_model("dualtoken")
    assert issubclass(model, Answers) and model.is_simple and not model.__abstractmethods__
    made = model.create_from_arg_string("pretrained=mini", {"batch_size": 2, "device": "cpu", "max_batch_size": None})
    assert isinstance(made.assistant, Assistant) and made.rank == 0


def test_lmms_eval_runs_a_local_task(tmp_path):
    """Its own program on six pictures; the right answers are those that the model gives without it."""
    pytest.importorskip("lmms_eval")
    datasets = pytest.importorskip("datasets")
    model, question = str(tiny.mllm_directory()), "what is the colour of the star ?"
    pictures = [Image.fromarray(scene(i, "test").render(tiny.SIZE)) for i in range(6)]
    chats = [[user(f"{question} {i}", picture)] for i, picture in enumerate(pictures)]
    wanted = Assistant.open(model, device="cpu").ask(chats, max_new_tokens=6)
    rows = [{"image": p, "question": f"{question} {i}", "answer": w}
            for i, (p, w) in enumerate(zip(pictures, wanted, strict=True))]  # fmt: skip
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data/test-00000-of-00001.parquet"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/utils.py").write_text("def pictures(doc):\n    return [doc['image'].convert('RGB')]\n")
    (tmp_path / "tasks/scenes.yaml").write_text(TASK.format(data=tmp_path / "data"))
    call = ["--model", "dualtoken", "--model_args", f"pretrained={model}", "--device", "cpu"]
    call += [
        "--tasks",
        "dualtoken_scenes",
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *call, "--limit", "4", "--batch_size", "2"], capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    written = list((tmp_path / "out").rglob("*_results.json"))
    assert len(written) == 1, done.stdout[-3000:] + done.stderr[-3000:]  # it ends with 0 when it fails, too
    (path,) = written
    found = json.loads(path.read_text())
    assert found["results"]["dualtoken_scenes"]["exact_match,none"] == 1.0
    assert found["n-samples"]["dualtoken_scenes"]["effective"] == 4
    assert main(["eval", "scores", "--lmms", str(path), "--output", str(tmp_path / "scores.json")]) == 0


def test_the_entry_point_names_the_class(monkeypatch):
    from dataclasses import dataclass

    @dataclass
    class ModelManifest:  # the fields of lmms_eval.models.registry_v2.ModelManifest
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(__import__("sys").modules, name, SimpleNamespace(ModelManifest=ModelManifest))
    made = lmms.manifest()
    assert made.model_id == "dualtoken" and made.simple_class_path == "dualtoken.eval.lmms_plugin.DualToken"
