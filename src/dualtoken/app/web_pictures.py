"""The tabs Draw and Edit: pictures that appear row by row."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from dualtoken.app import studio
from dualtoken.app.studio import BOTH, PIXEL_ONLY, Shown
from dualtoken.app.web_parts import (
    MODEL,
    QUIET,
    errors_in_page,
    gallery,
    large,
    picture_input,
    sampling_controls,
    sampling_of,
    stop_button,
    stop_of,
)
from dualtoken.mllm.assistant import Assistant

PROMPTS = (
    "draw a large plain red star on a black background",
    "draw a small striped blue ring on a white background",
    "draw a large dotted yellow square on a gray background",
)
INSTRUCTIONS = ("make the red star blue", "remove the blue ring", "move the green circle to the left")


def draw_tab(assistant: Assistant) -> None:
    """Prompt to pictures, with and without semantic codes side by side."""
    prompt = gr.Textbox(PROMPTS[0], label="prompt", max_length=2000)
    gr.Examples([[text] for text in PROMPTS], prompt, label="prompts")
    with gr.Row():
        number = gr.Slider(1, studio.LARGEST, 4, step=1, label="number of pictures")
        compare = gr.Checkbox(True, label="also draw the same seeds with pixel codes alone")
    sampling = sampling_controls(assistant)
    with gr.Row():
        button = gr.Button("Draw", variant="primary")
        place = gr.Row()
    with gr.Row():
        with_semantic, without = gallery(BOTH, height="auto"), gallery(PIXEL_ONLY, height="auto")

    def draw(
        prompt: str, number: int, compare: bool, guidance: float, pixel: float, semantic: float, seed: float | None,
        request: gr.Request, progress: gr.Progress = gr.Progress(),
    ) -> Any:  # fmt: skip
        with errors_in_page():
            chosen = sampling_of(guidance, pixel, semantic, seed)
            shown = studio.draw(assistant, prompt, int(number), chosen, compare, stop_of(request, "draw"))
            yield from _galleries(shown, progress, (BOTH, PIXEL_ONLY))

    event = gr.on([button.click, prompt.submit], draw, [prompt, number, compare, *sampling], [with_semantic, without],
                  show_progress_on=[with_semantic], **MODEL, **QUIET)  # fmt: skip
    with place:
        stop_button("draw", event)


def edit_tab(assistant: Assistant) -> None:
    """Picture and instruction to changed pictures."""
    with gr.Row():
        picture = picture_input("picture to change")
        with gr.Column(scale=2):
            instruction = gr.Textbox("make the red star blue", label="instruction", max_length=2000)
            gr.Examples([[text] for text in INSTRUCTIONS], instruction, label="instructions")
            number = gr.Slider(1, studio.LARGEST, 2, step=1, label="number of results")
            sampling = sampling_controls(assistant)
            with gr.Row():
                button = gr.Button("Edit", variant="primary")
                place = gr.Row()
            edited = gallery("edited", height="auto")

    def edit(
        picture: str | None, instruction: str, number: int, guidance: float, pixel: float, semantic: float,
        seed: float | None, request: gr.Request, progress: gr.Progress = gr.Progress(),
    ) -> Any:  # fmt: skip
        with errors_in_page():
            chosen = sampling_of(guidance, pixel, semantic, seed)
            shown = studio.edit(assistant, picture, instruction, int(number), chosen, stop_of(request, "edit"))
            for (pictures,) in _galleries(shown, progress, ("edited",)):
                yield pictures

    event = gr.on([button.click, instruction.submit], edit, [picture, instruction, number, *sampling], edited,
                  **MODEL, **QUIET)  # fmt: skip
    with place:
        stop_button("edit", event)


def _galleries(shown: Iterator[Shown], progress: gr.Progress, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """What the galleries of these names show after every row; closing it stops the drawing."""
    with closing(shown):
        for state in shown:
            progress((state.done, state.total), desc="positions", unit="positions")
            yield tuple(large(state.pictures.get(name, [])) for name in names)
