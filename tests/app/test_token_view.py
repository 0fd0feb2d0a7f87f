import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.app import token_view
from dualtoken.app.token_view import SWAPS, Coded, TokenView, enlarged
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.mllm.assistant import Assistant, user
from tests import tiny


@pytest.fixture(scope="module")
def view():
    return TokenView(Assistant(*tiny.mllm()))


@pytest.fixture(scope="module")
def coded(view):
    return view.scene(4)


def made(pixel, semantic, side=16):
    codes = DualCodes(torch.tensor([pixel]), torch.tensor([semantic]))
    return Coded("made", Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)), codes)


ONE = made([[1, 2], [1, 3], [4, 2], [1, 2]], [[5, 5], [6, 5], [7, 7], [5, 5]])
TWO = made([[8, 9]] * 4, [[10, 11]] * 4)


def test_a_picture_is_rebuilt_from_as_many_depths_as_are_asked_for(view, coded):
    whole = view.rebuilt(coded.codes)
    assert view.rebuilt(coded.codes, 2).tobytes() == whole.tobytes()
    first = DualCodes(coded.codes.pixel[..., :1], coded.codes.semantic)
    image = view.assistant.model.decode_image_tokens(first)
    assert view.rebuilt(coded.codes, 1).tobytes() == view.assistant.processor.image_processor.postprocess(image)[
        0].tobytes()  # fmt: skip
    assert view.rebuilt(coded.codes, 1).tobytes() != whole.tobytes()


def test_the_codes_are_those_that_the_model_reads(view):
    picture = Image.new("RGB", (30, 20), (10, 200, 30))
    expected = view.assistant.model.look(view.assistant.processor.image_processor([picture])["pixel_values"])
    found = view.code(picture).codes
    assert torch.equal(found.pixel, expected.pixel) and torch.equal(found.semantic, expected.semantic)


def test_places_are_counted_by_rows(view):
    assert [view.place(x, y, 100) for x, y in ((0, 0), (99, 49), (49, 50), (100, 100))] == [0, 1, 2, 3]


def test_a_positions_codes_and_how_often_they_are_in_the_picture(view):
    assert view.codes_at(ONE, 0) == [(1, 1, 3, 5, 2), (2, 2, 3, 5, 3)]


def test_codes_of_the_deeper_vocabulary_are_all_shown(view):
    """The table goes as deep as the deeper of both; the other has no entry there."""
    codes = DualCodes(ONE.codes.pixel, ONE.codes.semantic[..., :1])
    assert view.codes_at(Coded("x", ONE.picture, codes), 0) == [(1, 1, 3, 5, 2), (2, 2, 3, None, None)]


def test_maps_color_equal_codes_alike_and_frame_those_of_the_marked_position(view):
    plain = np.asarray(view.code_map(ONE, "pixel"))
    cell = len(plain) // 2
    colors = [tuple(plain[y, x]) for y in (cell // 2, cell + cell // 2) for x in (cell // 2, cell + cell // 2)]
    assert colors[0] == colors[1] == colors[3] != colors[2]
    marked = np.asarray(view.code_map(ONE, "pixel", 2, marked=0))
    frame = tuple(bytes.fromhex(token_view.FRAME[1:]))
    corners = [tuple(marked[y, x]) == frame for y in (0, cell) for x in (0, cell)]
    assert corners == [True, False, True, True]


def test_patches_that_share_codes_share_them_to_the_depth_asked_for(view, monkeypatch):
    other = made([[1, 2], [9, 9], [1, 9], [9, 2]], [[5, 0]] * 4)
    monkeypatch.setitem(view.__dict__, "references", [other])
    found = {d: [(p.name, p.position) for p in view.sharing(ONE, 0, "pixel", d)] for d in (1, 2)}
    assert found == {1: [("made", 1), ("made", 3), ("made", 0), ("made", 2)], 2: [("made", 3), ("made", 0)]}
    assert len(view.sharing(ONE, 0, "semantic", 1, most=3)) == 3
    assert view.sharing(ONE, 0, "semantic", 1)[0].picture.size == (3 * 144, 3 * 144)  # three by three of 144 px


@pytest.mark.parametrize("what", SWAPS)
def test_an_exchange_moves_what_it_says_and_nothing_else(view, what):
    first, second = view.swapped(ONE, TWO, what)
    pixel, semantic = first.pixel != ONE.codes.pixel, first.semantic != ONE.codes.semantic
    moved = {
        "semantic codes": (0, 8), "pixel codes": (8, 0), "first depth of the pixel codes": (4, 0),
        "lower half of both": (4, 4),
    }  # fmt: skip
    assert (int(pixel.sum()), int(semantic.sum())) == moved[what]
    assert torch.equal(first.pixel[pixel], TWO.codes.pixel[pixel])
    assert torch.equal(second.semantic[semantic], ONE.codes.semantic[semantic])
    back = view.swapped(made(first.pixel[0].tolist(), first.semantic[0].tolist()),
                        made(second.pixel[0].tolist(), second.semantic[0].tolist()), what)[0]  # fmt: skip
    assert torch.equal(back.pixel, ONE.codes.pixel) and torch.equal(back.semantic, ONE.codes.semantic)
    if what.startswith("lower"):
        assert not pixel[0, :2].any() and pixel[0, 2:].all()


def test_what_is_said_of_codes_is_what_is_said_of_their_picture(view, coded):
    asked = [[user(coded.picture, token_view.DETAIL)]]
    assert view.described(coded.codes) == view.assistant.ask(asked, max_new_tokens=64)[0]


def test_small_pictures_are_enlarged_by_whole_numbers():
    assert enlarged(Image.new("RGB", (48, 48))).size == (288, 288)
    assert enlarged(Image.new("RGB", (100, 100))).size == (200, 200)
    assert enlarged(Image.new("RGB", (512, 512))).size == (512, 512)


def test_mistakes_are_said_in_one_line(view):
    with pytest.raises(UserError, match="choose one of semantic codes"):
        view.swapped(ONE, TWO, "everything")
    with pytest.raises(UserError, match="give a picture"):
        view.code(None)
