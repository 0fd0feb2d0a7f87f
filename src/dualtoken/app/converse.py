"""`dualtoken chat | draw | edit | story`: the multimodal model from the command line.

Files are written when everything is made, each whole or not at all, so that a stop leaves no part of one.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dualtoken.app.report import Page, typed
from dualtoken.core.errors import UserError, at_least_one
from dualtoken.core.images import read_image, save_picture
from dualtoken.generation.sampling import DrawConfig, DrawEngine
from dualtoken.mllm.assistant import Assistant, Progress, user


@dataclass
class HeadOptions:
    """How one head draws; what is not given is as the model has it.

    Args: temperature: 0 = the likeliest code; top_k: 0 = all codes; top_p: share of the likeliest codes, up to 1.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def chat(
    question: str | None = None,
    image: str | list[str] | None = None,
    model: str = "mini",
    max_new_tokens: int | None = None,
) -> None:
    """Ask about pictures, or talk; without a question a prompt waits for your lines until an empty one.

    Args:
        question: what to ask; without it, a conversation.
        image: a picture to talk about, or several.
        model: a preset, or the directory of a multimodal model.
        max_new_tokens: longest answer; without it what the LLM has room for, at most 256.
    """
    paths = [image] if isinstance(image, str) else image or []
    pictures = [read_image(path) for path in paths]
    assistant = Assistant.open(model)
    if question is not None:
        print(assistant.ask([[assistant.about(pictures, question)]], max_new_tokens=max_new_tokens)[0])
        return
    print("Ask; /image PATH shows a picture, /new begins again, an empty line ends.")
    said: list[dict[str, Any]] = []
    while line := _line():
        if line == "/new":
            said, pictures = [], []
        elif line.startswith("/image "):
            try:
                pictures.append(read_image(line.removeprefix("/image ").strip()))
            except UserError as error:
                print(f"error: {error}")
        else:
            asked = assistant.about(pictures, line)
            try:
                answer = assistant.ask([[*said, asked]], max_new_tokens=max_new_tokens)[0]
            except UserError as error:
                print(f"error: {error}; /new begins again")
                continue
            said += [asked, {"role": "assistant", "content": answer}]
            pictures = []
            print(answer)


def draw(
    prompt: str,
    number: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    output: str = "drawings",
    model: str = "mini",
    pixel: HeadOptions = HeadOptions(),
    semantic: HeadOptions = HeadOptions(),
    semantic_codes: bool = True,
    scale: int = 1,
    engine: DrawEngine | None = None,
) -> None:
    """Draw pictures of a prompt.

    Args:
        prompt: what to draw.
        number: how many pictures.
        guidance: weight of classifier-free guidance, 1 = none; default: the model's.
        seed: of the first picture; picture j is made from seed + j.
        output: folder for the PNG files.
        model: a preset, or the directory of a multimodal model.
        pixel, semantic: sampling of each head.
        semantic_codes: false draws with pixel codes alone.
        scale: enlarge the files by a whole number, to look at small pictures.
        engine: how pictures are computed (docs/benchmarks.md): graph and compiled are for GPUs, auto chooses; default:
            the model's (auto in new ones).
    """
    _check(number, scale)
    assistant = Assistant.open(model, engine=engine)
    config = _sampling(assistant, guidance, pixel, semantic, semantic_codes)
    with _progress("drawing") as progress:
        pictures = assistant.draw([prompt], number, config, seed, progress)[0]
    _write(pictures, output, prompt, seed, scale)


def edit(
    image: str,
    instruction: str,
    number: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    output: str = "edits",
    model: str = "mini",
    pixel: HeadOptions = HeadOptions(),
    semantic: HeadOptions = HeadOptions(),
    scale: int = 1,
    engine: DrawEngine | None = None,
) -> None:
    """Change a picture as an instruction says.

    Args:
        image: the picture.
        instruction: what to change.
        number: how many results.
        guidance: weight of classifier-free guidance, 1 = none; default: the model's.
        seed: of the first picture; picture j is made from seed + j.
        output: folder for the PNG files.
        model: a preset, or the directory of a multimodal model.
        pixel, semantic: sampling of each head.
        scale: enlarge the files by a whole number.
        engine: how pictures are computed (docs/benchmarks.md): graph and compiled are for GPUs, auto chooses; default:
            the model's (auto in new ones).
    """
    _check(number, scale)
    picture = read_image(image)
    assistant = Assistant.open(model, engine=engine)
    config = _sampling(assistant, guidance, pixel, semantic, True)
    with _progress("editing") as progress:
        pictures = assistant.edit([picture], [instruction], number, config, seed, progress)[0]
    _write(pictures, output, instruction, seed, scale)


def story(
    prompt: str,
    image: str | list[str] | None = None,
    max_images: int = 4,
    guidance: float | None = None,
    seed: int = 0,
    output: str = "story",
    model: str = "mini",
    pixel: HeadOptions = HeadOptions(),
    semantic: HeadOptions = HeadOptions(),
    scale: int = 1,
    max_new_tokens: int = 64,
    engine: DrawEngine | None = None,
) -> None:
    """Tell a story in words and pictures; the model decides when to draw, and sees what it drew.

    Args:
        prompt: what to tell.
        image: a picture to begin from, or several.
        max_images: at most so many pictures.
        guidance: weight of classifier-free guidance, 1 = none; default: the model's.
        seed: of the first picture; picture j is made from seed + j.
        output: folder for index.html and the PNG files.
        model: a preset, or the directory of a multimodal model.
        pixel, semantic: sampling of each head.
        scale: enlarge the files by a whole number.
        max_new_tokens: longest stretch of words between pictures.
        engine: how pictures are computed (docs/benchmarks.md): graph and compiled are for GPUs, auto chooses; default:
            the model's (auto in new ones).
    """
    command = typed("dualtoken story", story, locals())
    _check(1, scale)
    paths = [image] if isinstance(image, str) else image or []
    pictures = [read_image(path) for path in paths]
    assistant = Assistant.open(model, engine=engine)
    config = _sampling(assistant, guidance, pixel, semantic, True)
    with _progress("telling") as progress:
        parts = assistant.tell(
            [[user(*pictures, prompt)]], max_images, config, seed, progress, max_new_tokens=max_new_tokens
        )[0]
    page, folder, drawn = Page(prompt, command=command), Path(output), 0
    for part in parts:
        if isinstance(part, str):
            print(part)
            page.text(part)
            continue
        drawn += 1
        place = folder / f"{drawn}.png"
        save_picture(_enlarged(part, scale), place)
        print(f"[picture: {place}]")
        page.picture(place, f"picture {drawn}", f"picture {drawn} of the story, drawn by the model: {prompt}")
    folder.mkdir(parents=True, exist_ok=True)
    page.write(folder / "index.html")
    print(f"written: {folder / 'index.html'}")


def _line() -> str:
    """A line of the person's, "" at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _check(number: int, scale: int) -> None:
    """Raise UserError for numbers of pictures and of enlargement below 1."""
    at_least_one(number=number)
    if scale < 1:
        raise UserError(f"--scale {scale}: give a whole number from 1")


def _sampling(
    assistant: Assistant, guidance: float | None, pixel: HeadOptions, semantic: HeadOptions, semantic_codes: bool
) -> DrawConfig:
    """The model's way of drawing with what the person gave in its place."""
    heads = ({name: value for name, value in asdict(h).items() if value is not None} for h in (pixel, semantic))
    return assistant.model.draw_config.changed(guidance, *heads, semantic_codes)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """A bar over the positions of the pictures being drawn."""
    with tqdm(desc=name, unit=" positions", disable=None, leave=False) as bar:

        def show(done: int, positions: int) -> None:
            bar.total = positions
            bar.n = done
            bar.refresh()

        yield show


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _write(pictures: list[Image.Image], output: str, name: str, seed: int, scale: int) -> None:
    """Each picture as FOLDER/WORDS-SEED.png."""
    words = "-".join(re.findall(r"[a-z0-9]+", name.lower()))[:60].strip("-") or "picture"
    for number, picture in enumerate(pictures):
        place = Path(output) / f"{words}-{seed + number}.png"
        save_picture(_enlarged(picture, scale), place)
        print(f"written: {place}")
