"""Evaluation of the multimodal model, with stand-ins that answer and draw rightly or wrongly by construction."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dualtoken.cli import main
from dualtoken.data.scene_text import QUESTION_TYPES
from dualtoken.data.scenes import COLORS, scene
from dualtoken.eval import generation, understanding
from dualtoken.eval.generation import draw_edits, draw_prompts, edit_shares, judge_drawings, judge_edit, psnr_outside
from dualtoken.eval.report import Share, share
from dualtoken.eval.understanding import ask_questions, commonest, describe_scenes, draw_questions
from dualtoken.mllm.assistant import user
from tests import tiny

SIZE = 48


class Oracle:
    """Answers with what it is given, and notes what it was asked."""

    processor = SimpleNamespace(image_processor=SimpleNamespace(size=SIZE))

    def __init__(self, answers):
        self.answers, self.asked = iter(answers), []

    def about(self, pictures, words):
        return user(*pictures, words)

    def ask(self, chats, **options):
        self.asked += chats
        return [next(self.answers) for _ in chats]


def test_questions_of_every_type_are_asked_and_judged():
    asked = draw_questions(12, "test", 0)
    assert {kind: sum(q.type == kind for _, q in asked) for kind in QUESTION_TYPES} == dict.fromkeys(QUESTION_TYPES, 12)
    assert asked == draw_questions(12, "test", 0) != draw_questions(12, "test", 1)
    right = Oracle([q.answer for _, q in asked])
    found = ask_questions(right, asked, 7, "test")
    assert all(a.right for a in found)
    assert all(a.right for a in ask_questions(Oracle([q.reply for _, q in asked]), asked, 7, "test"))
    (picture, text) = right.asked[5][0]["content"]
    assert np.array_equal(np.asarray(picture["image"]), scene(asked[5][0], "test").render(SIZE))
    assert text["text"] == asked[5][1].question
    assert not any(a.right for a in ask_questions(Oracle(["nonsense"] * len(asked)), asked, 7, "test"))
    assert 0.2 < commonest(found).value < 0.8  # yes-no questions are half right by a constant


def test_captions_are_judged_by_the_largest_object():
    def told(s, color=None):
        main = max(s.objects, key=lambda thing: thing.radius)
        others = [f"a {thing.texture} {thing.name}" for thing in s.objects if thing is not main]
        first = f"a {main.size} {main.texture} {color or main.color} {main.shape}"
        return " and ".join([first, *others]) + f" on a {s.background} background"

    scenes = [scene(i, "test") for i in range(40)]
    found = describe_scenes(Oracle([told(s) for s in scenes]), 40, 16, "test")
    assert {name: value.right for name, value in found.items()} == dict.fromkeys(found, 40)
    wrong = [told(s, "mauve") for s in scenes]
    assert describe_scenes(Oracle(wrong), 40, 16, "test")["color and shape of the main object"].right < 5  # twins


def test_true_pictures_are_judged_right_and_others_wrong():
    for objects, kind in ((1, "one object"), (2, "two objects with relation")):
        truths, prompts = draw_prompts(objects, 100, "test", 0)
        assert all(prompt.startswith("draw ") for prompt in prompts)
        pictures = [truth.render(SIZE) for truth in truths]
        assert judge_drawings(kind, truths, prompts, pictures)[kind].value >= 0.99  # 1.0 and 0.997 of 300
        shifted = pictures[1:] + pictures[:1]
        assert judge_drawings(kind, truths, prompts, shifted)[kind].value <= 0.1
        if objects == 2:  # the right things on the wrong sides
            turned = [picture[::-1, ::-1] for picture in pictures]
            assert judge_drawings(kind, truths, prompts, turned)[kind].value <= 0.1


def test_the_reader_is_measured_by_a_command_without_a_model(tmp_path):
    path = tmp_path / "r.json"
    assert main(["eval", "reader", "--drawings", "20", "--edited", "8", "--output", str(path)]) == 0
    shares = json.loads(path.read_text())["shares"]
    assert [shares[kind]["total"] for kind in ("one object", "two objects with relation", "edits")] == [20, 20, 8]
    assert shares["one object"]["share"] >= 0.95 and (tmp_path / "r.html").is_file()


def test_edits_are_judged_by_what_changed_and_by_the_rest():
    asked = draw_edits(100, "test", 0)
    assert len({e.type for e in asked}) == 4
    done = [judge_edit(edit, edit.after.render(SIZE)) for edit in asked]
    assert edit_shares(asked, done)["edits"].value >= 0.99  # 0.997 of 300
    undone = [judge_edit(edit, edit.before.render(SIZE)) for edit in asked]
    shares = edit_shares(asked, undone)
    assert shares["edits: changed as asked"].value <= 0.05
    assert shares["edits: rest at 22 dB or better"].value == 1.0
    elsewhere = [judge_edit(edit, 255 - edit.after.render(SIZE)) for edit in asked]
    assert edit_shares(asked, elsewhere)["edits: rest at 22 dB or better"].value <= 0.1


def test_psnr_outside_counts_only_what_lies_outside():
    truth = scene(1, "test").render(SIZE)
    thing = scene(1, "test").objects[0]
    inside = truth.copy()
    row, column = int(thing.y * SIZE), int(thing.x * SIZE)
    inside[row, column] = 255 - inside[row, column]
    assert psnr_outside(truth, inside, [thing]) > 70 > psnr_outside(truth, inside, [])
    noisy = np.clip(truth.astype(int) + 10, 0, 255).astype(np.uint8)
    plain = np.full_like(truth, 100)
    assert psnr_outside(plain, plain + 10, [thing]) == pytest.approx(20 * np.log10(25.5))
    assert psnr_outside(truth, noisy, [thing]) == pytest.approx(28.1, abs=0.6)


def test_shares_have_wilson_intervals():
    one = share([True] * 85 + [False] * 15)
    assert (one.right, one.total) == (85, 100)
    assert one.interval == pytest.approx((0.7672, 0.9069), abs=1e-4)  # by hand from Wilson's formula
    assert str(Share(0, 0)).startswith("nan")


@pytest.fixture(scope="module")
def model():
    return str(tiny.mllm_directory())


def test_commands_write_their_results(model, tmp_path, capsys):
    path = tmp_path / "u.json"
    ask = ["eval", "understanding", "--model", model, "--questions", "2", "--captions", "2", "--output", str(path)]
    assert main(ask) == 0
    found = json.loads(path.read_text())
    assert found["vqa"]["total"] == 2 * len(QUESTION_TYPES) and set(found["vqa_by_type"]) == set(QUESTION_TYPES)
    assert "commonest answer" in capsys.readouterr().out
    path = tmp_path / "g.json"
    drawn = ["eval", "generation", "--model", model, "--drawings", "3", "--edited", "4", "--output", str(path)]
    assert main([*drawn, "--pictures", str(tmp_path / "sheets"), "--guidance", "2"]) == 0
    found = json.loads(path.read_text())
    assert found["guidance"] == 2 and found["shares"]["one object"]["total"] == 3
    assert found["shares"]["edits"]["total"] == 4
    page = (tmp_path / "g.html").read_text()
    assert "shares.one object.share" in page and "dualtoken eval generation" in page
    sheets = {p.name for p in (tmp_path / "sheets").iterdir()}
    assert sheets == {"one-object.png", "two-objects-with-relation.png", "edits.png"}
    assert Image.open(tmp_path / "sheets/edits.png").width > 100
    assert main(["eval", "generation", "--model", model, "--drawings", "0"]) == 2


def test_the_words_of_the_world_are_those_of_the_baseline():
    assert set(COLORS) <= understanding.THINGS and generation.OUTSIDE_DB == 22
