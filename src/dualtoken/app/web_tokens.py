"""The tab Tokenize: a picture through its codes, what a position's codes are, and codes exchanged between pictures."""

from typing import Any

import gradio as gr
from PIL import Image

from dualtoken.app.token_view import SWAPS, Coded, TokenView, enlarged
from dualtoken.app.web_parts import MODEL, QUIET, errors_in_page, gallery, picture_input, shown_picture
from dualtoken.core.errors import UserError
from dualtoken.eval.report import cell
from dualtoken.mllm.assistant import Assistant

HINT = "Click a place in one of the pictures to see its codes."


def tokenize_tab(assistant: Assistant) -> None:
    """Reconstruction and code maps, codes of a position, exchange of codes."""
    view = TokenView(assistant)
    coded, position = gr.State(), gr.State()
    with gr.Row():
        picture = picture_input("picture")
        with gr.Column(scale=2):
            with gr.Row():
                seen = shown_picture("as the tokenizer sees it", "the picture, cut to a square")
                rebuilt = shown_picture("from its pixel codes", "the picture rebuilt from its pixel codes")
            depth = gr.Slider(1, view.depth("pixel"), view.depth("pixel"), step=1, label="depths used to rebuild it")
            with gr.Row():
                pixel_map = shown_picture("pixel codes", "map of the pixel codes")
                semantic_map = shown_picture("semantic codes", "map of the semantic codes")
            level = gr.Slider(1, min(map(view.depth, ("pixel", "semantic"))), 1, step=1,
                              label="depth of the maps, and depths that must agree to share a code")  # fmt: skip
    codes = gr.Markdown(HINT)
    with gr.Row():
        same_pixel = gallery("patches with the same pixel codes", columns=5, allow_preview=False, height=220)
        same_semantic = gallery("patches with the same semantic codes", columns=5, allow_preview=False, height=220)

    def load(picture: str | None, depth: int, level: int) -> Any:
        if picture is None:
            return None, None, None, None, None, None, HINT, [], []
        with errors_in_page():
            found = view.code(picture)
            maps = [view.code_map(found, name, level) for name in ("pixel", "semantic")]
            return found, None, enlarged(found.picture), rebuild(found, depth), *maps, HINT, [], []

    def rebuild(coded: Coded | None, depth: int) -> Image.Image | None:
        return None if coded is None else enlarged(view.rebuilt(coded.codes, int(depth)))

    def show(coded: Coded | None, position: int | None, level: int) -> Any:
        if coded is None:
            return None, None, HINT, [], []
        maps = [view.code_map(coded, name, level, position) for name in ("pixel", "semantic")]
        if position is None:
            return *maps, HINT, [], []
        patches = [
            [(patch.picture, f"{patch.name}, position {patch.position}")
             for patch in view.sharing(coded, position, name, int(level))]
            for name in ("pixel", "semantic")
        ]  # fmt: skip
        return *maps, codes_table(view, coded, position), *patches

    def click(coded: Coded | None, level: int, event: gr.SelectData) -> Any:
        if coded is None:
            return None, *show(None, None, level)
        side = view.code_map(coded, "pixel").width if event.target in (pixel_map, semantic_map) else (
            enlarged(coded.picture).width)  # fmt: skip
        place = view.place(*event.index, side)
        return place, *show(coded, place, level)

    found = [pixel_map, semantic_map, codes, same_pixel, same_semantic]
    picture.change(load, [picture, depth, level], [coded, position, seen, rebuilt, *found], **MODEL, **QUIET)
    depth.release(rebuild, [coded, depth], rebuilt, **MODEL, **QUIET)
    level.release(show, [coded, position, level], found, **MODEL, **QUIET)
    for shown in (seen, rebuilt, pixel_map, semantic_map):
        shown.select(click, [coded, level], [position, *found], **MODEL, **QUIET)
    with gr.Accordion("Exchange codes with another picture", open=False):
        _swap(view, picture)


def _swap(view: TokenView, picture: gr.Image) -> None:
    """The part of the tab where two pictures exchange codes."""
    with gr.Row():
        other = picture_input("the other picture")
        with gr.Column(scale=2):
            what = gr.Radio(SWAPS, value=SWAPS[0], label="what they exchange")
            button = gr.Button("Exchange", variant="primary")
            with gr.Row():
                first = shown_picture("the picture, with codes of the other", "the picture after the exchange")
                second = shown_picture("the other, with codes of the picture", "the other picture after the exchange")
            with gr.Row():
                first_said = gr.Textbox(label="what the model says of it", interactive=False)
                second_said = gr.Textbox(label="what the model says of it", interactive=False)

    def swap(picture: str | None, other: str | None, what: str) -> Any:
        with errors_in_page():
            if picture is None or other is None:
                raise UserError("give both pictures first: one at the top, one here")
            pair = view.swapped(view.code(picture), view.code(other), what)
            return *(enlarged(view.rebuilt(codes)) for codes in pair), *(view.described(codes) for codes in pair)

    button.click(swap, [picture, other, what], [first, second, first_said, second_said], **MODEL, **QUIET)


def codes_table(view: TokenView, coded: Coded, position: int) -> str:
    """The codes of a position as a Markdown table."""
    row, column = divmod(position, view.grid)
    lines = [
        f"**Position {position}** (row {row + 1}, column {column + 1} of {view.grid}); of {view.grid**2} positions of "
        "this picture so many have the same code:",
        "",
        "| depth | pixel code | positions | semantic code | positions |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, entry))} |" for entry in view.codes_at(coded, position))])
