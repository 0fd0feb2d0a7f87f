import builtins
import json

import pytest
from PIL import Image
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from dualtoken.app import converse
from dualtoken.cli import main
from dualtoken.data.scenes import scene
from dualtoken.generation import image
from dualtoken.mllm.assistant import Assistant
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return str(tiny.mllm_directory())


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "shown.png"
    Image.fromarray(scene(3, "test").render(32)).save(path)
    return str(path)


def test_draw_writes_a_file_for_each_seed_and_the_same_again(tmp_path, model, capsys):
    asked = ["draw", "a red circle!", "-n", "2", "--guidance", "2", "--seed", "5", "--model", model]
    assert main([*asked, "--out", str(tmp_path / "a")]) == 0
    names = {"a-red-circle-5.png", "a-red-circle-6.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    assert str(tmp_path / "a/a-red-circle-5.png") in capsys.readouterr().out
    assert main([*asked[:3], "1", *asked[4:], "--out", str(tmp_path / "b"), "--scale", "3"]) == 0
    one, three = (Image.open(tmp_path / f / "a-red-circle-5.png") for f in ("a", "b"))
    assert three.size == (3 * one.width, 3 * one.height)
    assert three.resize(one.size, Image.Resampling.NEAREST).tobytes() == one.tobytes()
    assert main([*asked, "--engine", "static", "--out", str(tmp_path / "c")]) == 0
    assert Image.open(tmp_path / "c/a-red-circle-5.png").tobytes() == one.tobytes()


def test_each_head_has_its_own_sampling(tmp_path, model):
    asked = ["draw", "a red circle", "--model", model, "--guidance", "1"]
    cold = ["--pixel.temperature", "0", "--semantic.temperature", "0"]
    made = {}
    for name, options in (("cold", cold), ("cold again", [*cold, "--seed", "0"]), ("pixel only", cold[:2])):
        assert main([*asked, *options, "--out", str(tmp_path / name)]) == 0
        made[name] = next((tmp_path / name).iterdir()).read_bytes()
    assert made["cold"] == made["cold again"]
    config = converse._sampling(
        Assistant.open(model), 1.5, converse.HeadOptions(top_k=7), converse.HeadOptions(), False
    )
    assert (config.pixel.top_k, config.semantic.top_k, config.guidance, config.semantic_codes) == (7, 900, 1.5, False)


def test_edit_and_story_write_what_they_say(tmp_path, model, picture, capsys):
    assert main(["edit", picture, "make the circle red", "--model", model, "--out", str(tmp_path / "edit")]) == 0
    assert [p.name for p in (tmp_path / "edit").iterdir()] == ["make-the-circle-red-0.png"]
    story = ["story", "tell a story", "--model", model, "--out", str(tmp_path / "story"), "--max_new_tokens", "4"]
    assert main(story) == 0
    assert (tmp_path / "story/index.html").is_file()
    assert "index.html" in capsys.readouterr().out


def test_chat_answers_once_or_in_turns(model, picture, capsys, monkeypatch):
    asked = ["chat", "--model", model, "--max_new_tokens", "3"]
    assert main([*asked, "--image", picture, "what is it ?"]) == 0
    seen = []

    def answer(self, chats, **options):
        seen.append([message["role"] for message in chats[0]])
        shown.append(sum(p["type"] == "image" for m in chats[0] if m["role"] == "user" for p in m["content"]))
        return [f"answer {len(seen)}"]

    shown = []
    monkeypatch.setattr(Assistant, "ask", answer)
    lines = iter(["what is it ?", "/image nowhere.png", f"/image {picture}", "and this ?", "/new", "again", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert main([*asked, "--image", picture]) == 0
    out = capsys.readouterr().out
    assert "answer 1" in out and "answer 3" in out and "nowhere.png: no such file" in out
    assert seen == [["user"], ["user", "assistant", "user"], ["user"]]
    assert shown == [1, 2, 0]


def test_a_stop_leaves_no_part_of_a_file(tmp_path, model, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Assistant, "draw", interrupted)
    assert main(["draw", "a star", "--model", model, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "save", half_saved)
    assert main(["draw", "a star", "--model", model, "--out", str(tmp_path / "out")]) == 130
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", ["draw", "edit", "story", "chat"])
def test_a_stop_in_the_middle_of_the_work_leaves_nothing(command, tmp_path, model, picture, monkeypatch):
    calls = []

    def third(*args, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    if command in ("draw", "edit"):
        real = image.choose
        monkeypatch.setattr(image, "choose", third)
    else:
        real = Qwen2Model.forward
        monkeypatch.setattr(Qwen2Model, "forward", third)
    asked = [command, *([picture] if command == "edit" else []), "a star", "--model", model]
    folder = tmp_path / "out"
    before = set(tmp_path.rglob("*"))
    assert main([*asked, *([] if command == "chat" else ["--out", str(folder)])]) == 130
    assert len(calls) == 3 and not folder.exists() and set(tmp_path.rglob("*")) == before


def half_saved(self, path, **options):
    path.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["draw", "x", "-n", "0"], "--number 0"),
        (["draw", "x", "--pixel.top_p", "0"], "top_p"),
        (["draw", "x", "--scale", "0"], "--scale 0"),
        (["edit", "nowhere.png", "x"], "nowhere.png: no such file"),
        (["chat", "--image", "nowhere.png", "x"], "nowhere.png: no such file"),
        (["story", "x", "--scale", "0"], "--scale 0"),
        (["chat", "long " * 400], "tokens"),
        (["chat", "x", "--max_new_tokens", "0"], "max_new_tokens 0"),
        (["draw", "long " * 400], "more than the 128"),
        (["edit", "PICTURE", "long " * 400], "more than the 128"),
        (["story", "long " * 400], "more than the 128"),
        (["story", "x", "--image", json.dumps(["PICTURE"] * 30)], "more than the 128"),
        (["chat", "x", "--image", json.dumps(["PICTURE"] * 30)], "more than the 128"),
    ],
)
def test_mistakes_are_one_line(arguments, words, model, picture, capsys, tmp_path):
    arguments = [argument.replace("PICTURE", picture) for argument in arguments]
    out = [] if arguments[0] == "chat" else ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--model", model, *out]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_model_is_refused(capsys):
    assert main(["draw", "x", "--model", str(tiny.tokenizer_directory())]) == 2
    assert "'dualtoken' is needed" in capsys.readouterr().err
