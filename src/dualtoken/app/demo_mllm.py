"""The part of `dualtoken demo` where the multimodal model looks, draws, edits and tells a story."""

import textwrap
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualtoken.app.figures import draw_captioned, draw_rows
from dualtoken.app.report import Page
from dualtoken.core.images import image_bytes, read_image
from dualtoken.data.scene_chat import DETAIL, story_prompt
from dualtoken.data.scene_text import EDIT_TYPES, QUESTION_TYPES
from dualtoken.data.scenes import scene
from dualtoken.eval.generation import draw_edits, judge_edit
from dualtoken.eval.scene_reader import shows
from dualtoken.eval.understanding import ask_questions, draw_questions, picture_of
from dualtoken.mllm.assistant import Assistant, user

ASKED = 8  # pictures with a question each
DRAWN = 4  # pictures of a prompt
PROMPTS = (
    ("a large plain red star on a black background", "red", "star"),
    ("a small striped blue ring on a white background", "blue", "ring"),
    ("a large dotted yellow square on a gray background", "yellow", "square"),
)


def show_model(page: Page, folder: Path, assistant: Assistant, own: dict[str, Path], seed: int) -> dict:
    """Questions, drawings, edits and a story into the page; returns what was counted."""
    page.heading("Questions and answers")
    found = {"questions": _show_answers(page, folder, assistant, own, seed)}
    page.heading("Pictures from words")
    found["drawings"] = _show_drawings(page, folder, assistant, seed)
    page.heading("Edits")
    found["edits"] = _show_edits(page, folder, assistant, seed)
    page.heading("A story in words and pictures")
    _show_story(page, folder, assistant, seed)
    return found


def _show_answers(page: Page, folder: Path, assistant: Assistant, own: dict[str, Path], seed: int) -> dict:
    size = assistant.processor.image_processor.size
    possible, asked = draw_questions(10 * ASKED, "test", seed + 1000), {}
    for kind in islice(cycle(QUESTION_TYPES), ASKED):  # the types in turn, each about another scene
        index, question = next((i, q) for i, q in possible if q.type == kind and i not in asked)
        asked[index] = question
    answers = ask_questions(assistant, list(asked.items()), ASKED, "test")
    pictures = [picture_of(scene(a.scene, "test"), size) for a in answers]
    lines = [f"{a.question.question}\n{a.said}" + ("" if a.right else f"\n(wrong: {a.question.answer})")
             for a in answers]  # fmt: skip
    right = sum(a.right for a in answers)
    path = draw_captioned(folder / "answers.png", _stack(pictures), lines)
    page.picture(path, f"Questions about unseen scenes; {right} of {len(answers)} right.")
    if own:
        mine = [read_image(file) for file in list(own.values())[:ASKED]]
        said = assistant.ask([[assistant.about([picture], DETAIL)] for picture in mine], max_new_tokens=60)
        shown = [picture.resize((size, size)) for picture in mine]
        path = draw_captioned(folder / "answers_yours.png", _stack(shown), [_wrapped(text) for text in said])
        page.picture(path, "Your pictures, described. The miniature has words for drawn shapes only.")
    return {"right": right, "asked": len(answers)}


def _show_drawings(page: Page, folder: Path, assistant: Assistant, seed: int) -> dict:
    config = assistant.model.draw_config
    prompts = [f"draw {text}" for text, _, _ in PROMPTS]
    counts, rows = {}, {}
    for name, semantic in (("with semantic codes", True), ("pixel codes alone", False)):
        made = assistant.draw(prompts, DRAWN, replace(config, semantic_codes=semantic), seed)
        asked = [(color, shape) for _, color, shape in PROMPTS for _ in range(DRAWN)]
        pictures = [np.asarray(picture) for group in made for picture in group]
        counts[name] = sum(shows(p, *thing) for p, thing in zip(pictures, asked, strict=True))
        rows[name] = made
    total = DRAWN * len(PROMPTS)
    both = [[*rows["with semantic codes"][i], *rows["pixel codes alone"][i]] for i in range(len(PROMPTS))]
    path = draw_rows(
        folder / "drawings.png", [_stack(row) for row in both], [_wrapped(text, 16) for text, _, _ in PROMPTS],
        ["with semantic codes", "", "", "", "pixel codes alone", "", "", ""],
    )  # fmt: skip
    told = ", ".join(f"{count} of {total} {name}" for name, count in counts.items())
    page.picture(path, f"A rule-based reader finds the asked color and shape in {told} (compare Table 5b, Fig. 5).")
    return counts | {"of": total}


def _show_edits(page: Page, folder: Path, assistant: Assistant, seed: int) -> dict:
    size = assistant.processor.image_processor.size
    asked = draw_edits(2 * len(EDIT_TYPES), "test", seed + 1000)
    shown = [picture_of(edit.before, size) for edit in asked]
    made = [group[0] for group in assistant.edit(shown, [edit.instruction for edit in asked], seed=seed)]
    good = sum(judge_edit(edit, np.asarray(picture)).good for edit, picture in zip(asked, made, strict=True))
    rows = [_stack(shown), _stack(made), _stack([picture_of(edit.after, size) for edit in asked])]
    titles = [_wrapped(edit.instruction, 18) for edit in asked]
    path = draw_rows(folder / "edits.png", rows, ["before", "edited", "as meant"], titles)
    page.picture(path, f"{good} of {len(asked)} did what was asked and left the rest as it was.")
    return {"good": good, "of": len(asked)}


def _show_story(page: Page, folder: Path, assistant: Assistant, seed: int) -> None:
    begin = next(s for s in (scene(i, "test") for i in range(1000 * seed, 1000 * seed + 500)) if len(s.objects) == 2)
    prompt = story_prompt(begin, 3)
    parts = assistant.tell([[user(prompt)]], max_images=4, seed=seed, max_new_tokens=40)[0]
    pictures, lines, words = [], [], ""
    for part in parts:
        if isinstance(part, str):
            words = f"{words} {part}".strip()
        else:
            pictures.append(part)
            lines.append(_wrapped(words))
            words = ""
    page.text(f"Asked: {prompt}. The model decides when to draw, and sees what it drew.")
    if pictures:
        page.picture(draw_captioned(folder / "story.png", _stack(pictures), lines), " / ".join(lines) or prompt)
    if words or not pictures:
        page.text(words or "(no reply)")


def _stack(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([image_bytes(picture) for picture in pictures])


def _wrapped(text: str, width: int = 24) -> str:
    """Text in lines of about `width` characters."""
    return "\n".join(textwrap.wrap(text, width))
