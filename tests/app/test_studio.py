import threading

import numpy as np
import pytest
from PIL import Image

from dualtoken.app import studio
from dualtoken.app.studio import BOTH, PIXEL_ONLY, Sampling
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.mllm.assistant import Assistant, user
from tests import tiny


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*tiny.mllm())


def same(one, other):
    return [np.asarray(p).tolist() for p in one] == [np.asarray(p).tolist() for p in other]


def test_pictures_appear_row_by_row_and_end_as_the_assistant_draws_them(assistant):
    sampling = Sampling(guidance=2, pixel=0.5, semantic=0.7, seed=3)
    states = list(studio.draw(assistant, "a red star", 2, sampling, compare=True))
    assert [(s.done, s.total) for s in states] == [(2, 8), (6, 8), (8, 8)]  # two rows of two positions, twice
    assert [list(s.pictures) for s in states] == [[BOTH], [BOTH, PIXEL_ONLY], [BOTH, PIXEL_ONLY]]
    for name, semantic in ((BOTH, True), (PIXEL_ONLY, False)):
        config = sampling.config(assistant, semantic)
        assert (config.guidance, config.pixel.temperature, config.semantic.temperature) == (2, 0.5, 0.7)
        assert config.semantic_codes is semantic
        assert same(states[-1].pictures[name], assistant.draw(["a red star"], 2, config, 3)[0])


def test_what_is_not_drawn_yet_is_gray_and_the_rest_is_the_picture(assistant):
    codes = assistant.model.look(tiny.images(1))
    (half,) = studio.unfinished(assistant, DualCodes(codes.pixel[:, :2], codes.semantic[:, :2]))
    pixels = np.asarray(half)
    gray = round((studio.EMPTY + 1) * 127.5)
    assert (pixels[8:] == gray).all() and not (pixels[:8] == gray).all()
    (whole,) = studio.unfinished(assistant, codes)
    made = assistant.processor.image_processor.postprocess(assistant.model.decode_image_tokens(codes))
    assert same([whole], made)


def test_a_drawing_that_is_closed_is_not_drawn_on(assistant, monkeypatch):
    drawn = []
    hidden = assistant.model.hidden
    monkeypatch.setattr(assistant.model, "hidden", lambda *a, **k: drawn.append(1) or hidden(*a, **k))
    before = threading.active_count()
    reader = studio.draw(assistant, "a star", 1, Sampling())
    next(reader)
    reader.close()
    assert 2 <= len(drawn) <= 4 and threading.active_count() == before
    seen = len(drawn)
    assert list(studio.draw(assistant, "a star", 1, Sampling()))[-1].done == 4 and len(drawn) == seen + 4


def test_edits_and_stories_are_those_of_the_assistant(assistant):
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    states = list(studio.edit(assistant, picture, "make it blue", 2, Sampling(guidance=1, seed=5)))
    assert [s.done for s in states] == [2, 4]
    assert same(states[-1].pictures["edited"], assistant.edit(
        [picture], ["make it blue"], 2, Sampling(guidance=1).config(assistant), 5)[0])  # fmt: skip
    bias = {"sequence_bias": {(assistant.model.config.draw_start_id,): 50.0}}  # it draws at once
    assistant.model.generation_config.update(**bias)
    states = list(studio.tell(assistant, "tell a story", [picture], 2, Sampling(), words=4))
    assistant.model.generation_config.update(sequence_bias=None)
    assert [s.number for s in states[:-1]] == [1, 1, 2, 2] and all(s.drawing.size == (16, 16) for s in states[:-1])
    assert states[-1].drawing is None and sum(not isinstance(p, str) for p in states[-1].parts) == 2


def test_answers_grow_to_what_the_assistant_says(assistant, monkeypatch):
    chat = [user(Image.new("RGB", (20, 20)), "what is it ?")]
    word = assistant.processor.tokenizer.encode("star")[0]  # it would say nothing
    monkeypatch.setattr(assistant.model.llm.generation_config, "sequence_bias", [[[word], 50.0]], raising=False)
    grown = list(studio.answer(assistant, chat, max_new_tokens=4))
    assert grown[-1] == assistant.ask([chat], max_new_tokens=4)[0]
    assert len(grown) == 5 and [len(part) for part in grown] == sorted(len(part) for part in grown)
    assert 0 < len(grown[0]) < len(grown[-1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a: studio.draw(a, "  ", 1, Sampling()), "write what you want"),
        (lambda a: studio.draw(a, "x", 99, Sampling()), "99 pictures: ask for 1 to 16"),
        (lambda a: studio.draw(a, "x", 1, Sampling(pixel=-1)), "temperature -1"),
        (lambda a: studio.draw(a, "long " * 400, 1, Sampling()), "tokens"),
        (lambda a: studio.edit(a, None, "x", 1, Sampling()), "give a picture"),
        (lambda a: studio.tell(a, "", [], 1, Sampling()), "write what you want"),
    ],
)
def test_mistakes_are_said_in_one_line(assistant, make, words):
    with pytest.raises(UserError, match=words):
        list(make(assistant))


def test_the_models_other_settings_stay(assistant):
    own = assistant.model.draw_config
    assert Sampling(own.guidance, own.pixel.temperature, own.semantic.temperature).config(assistant) == own
