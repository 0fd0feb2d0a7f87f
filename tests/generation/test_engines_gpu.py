"""The engines where steps are recorded: on a GPU alone."""

import copy

import pytest
import torch

from dualtoken.generation import image
from dualtoken.generation.sampling import DrawConfig
from tests.generation.lively import chats, inputs, shared
from tests.generation.test_engines import FREE, LIKELIEST, draw, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded on a GPU, and there is none")


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(shared()[0]).to("cuda")


def given(count, turn=0):
    """Inputs of `count` prompts on the GPU."""
    asked = chats()
    made = inputs(shared()[1], [asked[(turn + k) % len(asked)] for k in range(count)])
    return {k: v.to("cuda") if hasattr(v, "to") else v for k, v in made.items()}


@pytest.mark.parametrize("sampling", [LIKELIEST, FREE], ids=["greedy", "seeded"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("engine", ["static", "graph", "compiled"])
def test_pictures_are_those_of_the_plain_engine(model, engine, guidance, sampling):
    for turn in range(3):  # from the second on the recording of the first is played
        asked = given(2, turn)
        plain = draw(model, asked, "plain", guidance, sampling)
        assert same(draw(model, asked, engine, guidance, sampling), plain)
    options = {"semantic_codes": False}
    assert same(draw(model, asked, engine, guidance, sampling, **options),
                draw(model, asked, "plain", guidance, sampling, **options))  # fmt: skip


def kept(model):
    """The drawing that was recorded last, and its step."""
    return image.kept_by(model)._last[0][1:]


def test_a_recording_is_kept_for_pictures_of_the_same_room_and_made_anew_for_other_weights(model):
    asked = given(2)
    first = draw(model, asked, "graph", 3.0, FREE)
    step = kept(model)[1]
    assert same(draw(model, asked, "graph", 3.0, FREE), first) and kept(model)[1] is step
    draw(model, given(1), "graph", 3.0, FREE)
    assert kept(model)[1] is not step
    step, head = kept(model)[1], model.pixel_head.classifiers[0].weight
    old, head.data = head.data, -head.data
    changed = draw(model, given(1), "graph", 3.0, FREE)
    assert kept(model)[1] is not step
    assert same(changed, draw(model, given(1), "plain", 3.0, FREE))
    head.data = old
    assert not image.kept_by(copy.deepcopy(model))._last


def test_auto_takes_the_recorded_steps(model):
    assert image.engine_of(model, DrawConfig()).engine == "graph"


@torch.no_grad()
def test_neither_playing_a_recording_nor_the_step_itself_waits(model):
    draw(model, given(2), "graph", 3.0, FREE)
    drawing, step = kept(model)
    drawing.restart(drawing.rows, [0, 1])
    drawing.begin()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        drawing.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
