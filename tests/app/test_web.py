"""The page in a real browser: every tab once, with a model of a few thousand parameters; no call leaves the machine."""

import os
import shutil
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from dualtoken.core.errors import UserError
from dualtoken.core.images import read_image
from dualtoken.mllm.assistant import Assistant
from tests import tiny

pytest.importorskip("gradio", reason="the extra app is not installed")

from dualtoken.app import web, web_words
from dualtoken.app.web_parts import STOPS, errors_in_page, stop, stop_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # ms
STEPS = 2 * 4 * 2  # of a drawing: two ways, four positions, two depths


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*tiny.mllm())


@pytest.fixture(scope="module")
def blocks(assistant):
    return web.build(assistant, "tiny")


@pytest.fixture(scope="module")
def page(blocks):
    """The page with its `asked` addresses and its `errors`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    _, address, _ = web.launch(blocks, "127.0.0.1", 0)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 1400})
        opened.set_default_timeout(WAIT)
        opened.asked, opened.errors = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto(address)
        opened.address = address
        yield opened
        if folder := os.environ.get("DUALTOKEN_SCREENSHOTS"):  # to look at: a picture of each tab
            for name in ("Tokenize", "Look", "Draw", "Edit", "Story"):
                open_tab(opened, name)
                opened.screenshot(path=f"{folder}/{name}.png", full_page=True)
        browser.close()
    blocks.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "shown.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return str(path)


def open_tab(page, name):
    """The panel of a tab."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").locator("visible=true").first


def test_tokenize_shows_maps_and_the_codes_of_a_clicked_place(page, picture):
    tab = open_tab(page, "Tokenize")
    tab.locator("input[type=file]").first.set_input_files(picture)
    for label in ("the picture, cut to a square", "the picture rebuilt from its pixel codes", "map of the pixel codes"):
        page.get_by_alt_text(label, exact=True).wait_for()
    page.get_by_alt_text("map of the pixel codes", exact=True).click(position={"x": 20, "y": 20})
    tab.get_by_text("Position 0", exact=True).wait_for()


def test_two_pictures_exchange_codes(page, picture):
    tab = open_tab(page, "Tokenize")
    tab.get_by_role("button", name="Exchange codes with another picture").click()
    tab.get_by_role("button", name="Exchange", exact=True).click()
    page.get_by_text("give both pictures first").first.wait_for()
    tab.locator("input[type=file]").last.set_input_files(picture)
    tab.get_by_alt_text("the picture after the exchange", exact=True).wait_for(state="detached")
    page.wait_for_timeout(1000)  # until the file is there
    tab.get_by_role("button", name="Exchange", exact=True).click()
    for label in ("the picture after the exchange", "the other picture after the exchange"):
        page.get_by_alt_text(label, exact=True).wait_for()


def test_look_answers_and_says_mistakes(page):
    tab = open_tab(page, "Look")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_test_id("bot").first.wait_for()
    tab.get_by_label("message", exact=True).fill("")
    tab.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("write a message first").first.wait_for()


def test_draw_shows_both_ways_side_by_side(page):
    tab = open_tab(page, "Draw")
    tab.get_by_role("button", name="Draw", exact=True).click()
    tab.locator(".grid-wrap img").nth(7).wait_for()  # four pictures in each of two ways


class Held:
    """The pixel head's steps, which stand still from the second one on until `go`."""

    def __init__(self, step):
        self.step, self.steps, self.go, self.thread = step, 0, threading.Event(), None

    def __call__(self, *given):
        self.steps, self.thread = self.steps + 1, threading.current_thread()
        if self.steps > 1:
            self.go.wait(WAIT / 1000)
        return self.step(*given)


@pytest.fixture
def held(assistant, monkeypatch):
    head = assistant.model.pixel_head
    steps = Held(head.step)
    monkeypatch.setattr(head, "step", steps)
    yield steps
    steps.go.set()


def until(condition, page):
    for _ in range(WAIT // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail("it did not happen in time")


def draw_and(end, page, held):
    """Begin to draw on a page, end it, and see that it ends before its last step."""
    before = set(STOPS.values())
    open_tab(page, "Draw").get_by_role("button", name="Draw", exact=True).click()
    until(lambda: held.steps == 2, page)
    (stop,) = set(STOPS.values()) - before
    end()
    assert stop.wait(WAIT / 1000)
    held.go.set()
    held.thread.join(WAIT / 1000)  # the position under way is finished
    assert not held.thread.is_alive() and held.steps < STEPS


def test_stop_ends_a_drawing_and_the_next_one_is_whole(page, held):
    tab = open_tab(page, "Draw")
    draw_and(tab.get_by_role("button", name="Stop", exact=True).click, page, held)
    held.steps = 0
    tab.get_by_role("button", name="Draw", exact=True).click()
    until(lambda: held.steps == STEPS, page)
    held.thread.join(WAIT / 1000)
    tab.locator(".grid-wrap img").nth(7).wait_for()


def test_a_page_that_is_closed_ends_its_drawing(page, held):
    known = set(STOPS)
    other = page.context.browser.new_page()
    other.set_default_timeout(WAIT)
    other.goto(page.address)
    draw_and(other.close, other, held)
    assert set(STOPS) == known


def test_edit_changes_a_picture_and_asks_for_one(page, picture):
    tab = open_tab(page, "Edit")
    tab.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("give a picture to change").first.wait_for()
    tab.locator("input[type=file]").first.set_input_files(picture)
    tab.get_by_role("button", name="Edit", exact=True).click()
    tab.locator(".grid-wrap img").nth(9).wait_for()  # eight to pick from, two edited


def test_story_is_told(page):
    tab = open_tab(page, "Story")
    tab.get_by_role("button", name="Tell", exact=True).click()
    tab.get_by_test_id("bot").first.wait_for()


def test_the_page_asks_nobody_else_and_breaks_nowhere(page):
    assert page.asked and page.errors == []
    elsewhere = [a for a in page.asked if not a.startswith((page.address, "data:", "blob:"))]
    assert elsewhere == []


def test_telemetry_is_off(blocks):
    assert blocks.analytics_enabled is False


def test_messages_for_the_page_are_those_for_the_model(picture):
    said = web_words.message("what is it ?", picture)
    assert said["content"][0] == {"type": "image", "path": picture}
    assert web_words.message("what is it ?", picture, True)["content"] == said["content"][::-1]
    shown = web_words.for_chatbot([said, {"role": "assistant", "content": ""}])
    assert shown == [
        {"role": "user", "content": [{"path": picture}, "what is it ?"]},
        {"role": "assistant", "content": "(no reply)"},
    ]


def test_stop_ends_the_work_of_its_own_tab_and_leaving_that_of_all():
    one, other = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="other")
    draw, look, elsewhere = stop_of(one, "draw"), stop_of(one, "look"), stop_of(other, "look")
    stop(one, "look")
    assert (draw.is_set(), look.is_set(), elsewhere.is_set()) == (False, True, False)
    stop(one)
    assert draw.is_set() and not elsewhere.is_set()
    stop(other)


def test_a_picture_that_is_no_longer_kept_is_said_without_its_path(tmp_path):
    with pytest.raises(web.gradio().Error, match="no longer kept") as found, errors_in_page():
        read_image(tmp_path / "gone.png")
    assert str(tmp_path) not in str(found.value)


@pytest.mark.parametrize("port", [70000, -5])
def test_a_port_that_cannot_be_had_is_said(port):
    with web.gradio().Blocks() as empty, pytest.raises(UserError, match=f"--port {port}: cannot listen"):
        web.launch(empty, "127.0.0.1", port)
