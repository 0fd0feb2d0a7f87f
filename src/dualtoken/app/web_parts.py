"""Pieces that several tabs of the web app share: pictures to pick, sampling, errors in the page, one queue."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import gradio as gr
from PIL import Image

from dualtoken.app.studio import Sampling
from dualtoken.app.token_view import enlarged
from dualtoken.core.errors import UserError
from dualtoken.core.images import ImageError, read_image
from dualtoken.data.images import photographs
from dualtoken.data.scenes import scene
from dualtoken.mllm.assistant import Assistant

MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one request at a time, the others wait in line
QUIET = {"api_visibility": "private"}  # no entry in the page's API: `dualtoken serve` has one
SIDE = 192  # px of a drawn scene on the page
STOPS: dict[tuple[str | None, str], threading.Event] = {}  # by page and tab, of what it asked for last


@contextmanager
def errors_in_page() -> Iterator[None]:
    """A mistake of the person's is said in the page, without a traceback."""
    try:
        yield
    except ImageError as error:
        gone = "a picture of this page is no longer kept (a day at most): give it again, or begin a new conversation"
        raise gr.Error(gone if str(error).endswith("no such file") else str(error), print_exception=False) from None
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


@lru_cache(maxsize=1)
def samples() -> list[Image.Image]:
    """Pictures to pick: unseen scenes, and photographs that scikit-image ships."""
    drawn = [Image.fromarray(scene(index, "test").render(SIDE)) for index in range(6)]
    return drawn + [read_image(path) for path in photographs(SIDE).files[:2]]


def picture_input(label: str, pick: str = "or pick one") -> gr.Image:
    """A place for a picture with some below it to pick from; its value is a path, or None."""
    with gr.Column(min_width=220):
        picture = gr.Image(
            label=label, type="filepath", image_mode=None, format="png", height=260,
            sources=["upload", "clipboard"], buttons=[],
        )  # fmt: skip
        picked = gr.Gallery(
            samples(), label=pick, columns=4, height=220, allow_preview=False, format="png", buttons=[],
            interactive=False,
        )  # fmt: skip

    def pick_one(event: gr.SelectData) -> Image.Image:
        return samples()[event.index]

    picked.select(pick_one, None, picture, queue=False, **QUIET)
    return picture


def shown_picture(label: str, alt: str, **options: Any) -> gr.Image:
    """A place for a picture that the app makes."""
    options = {"buttons": ["download", "fullscreen"]} | options
    return gr.Image(label=label, alt_text=alt, interactive=False, format="png", type="pil", **options)


def gallery(label: str, columns: int = 4, **options: Any) -> gr.Gallery:
    """A place for several pictures that the app makes."""
    return gr.Gallery(
        label=label, columns=columns, format="png", interactive=False, object_fit="contain",
        buttons=["download", "fullscreen"], **options,
    )  # fmt: skip


def large(pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures enlarged for the page."""
    return [enlarged(picture) for picture in pictures]


def sampling_controls(assistant: Assistant) -> list[gr.components.Component]:
    """Guidance, temperature of both heads and seed, in the order of `Sampling`, as the model has them."""
    own = assistant.model.draw_config
    with gr.Row():
        return [
            gr.Slider(1, 10, own.guidance, step=0.5, label="guidance (1 = none)"),
            gr.Slider(0, 2, own.pixel.temperature, step=0.05, label="pixel temperature"),
            gr.Slider(0, 2, own.semantic.temperature, step=0.05, label="semantic temperature"),
            gr.Number(0, precision=0, minimum=0, label="seed"),
        ]


def sampling_of(guidance: float, pixel: float, semantic: float, seed: float | None) -> Sampling:
    """What the controls say. Raises UserError for a seed that is none."""
    if seed is None or not 0 <= seed < 2**32:
        raise UserError(f"seed {seed}: give a whole number from 0 to {2**32 - 1}")
    return Sampling(guidance, pixel, semantic, int(seed))


def stop_of(request: gr.Request, tab: str) -> threading.Event:
    """What the Stop button of a tab of the page that asks will set, from now on."""
    event = STOPS[request.session_hash, tab] = threading.Event()
    return event


def stop(request: gr.Request, tab: str | None = None) -> None:
    """End what a tab of a page asked for last, where it is still at work; of all tabs where the page is closed."""
    for key in [key for key in list(STOPS) if key[0] == request.session_hash and tab in (None, key[1])]:
        if event := STOPS.pop(key, None):
            event.set()


def stop_button(tab: str, *events: Any) -> gr.Button:
    """A button that ends what these events began: those that wait leave the line, the one at work ends itself.

    (Gradio alone would stop listening to it, and it would hold the model until it is done.)
    """
    button = gr.Button("Stop", variant="stop", min_width=80)

    def stop_tab(request: gr.Request) -> None:
        stop(request, tab)

    button.click(stop_tab, None, None, cancels=list(events), queue=False, **QUIET)
    return button
