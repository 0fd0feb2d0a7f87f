"""`dualtoken eval generation`: drawings and edits of unseen scenes, judged by a rule-based reader of the picture.

The reader (`scene_reader.py`) looks at the picture alone and knows nothing of the model.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from dualtoken.core.errors import UserError, at_least_one
from dualtoken.core.images import image_bytes, save_picture, to_picture
from dualtoken.data.scene_chat import RELATION
from dualtoken.data.scene_text import EDIT_TYPES, Edit, caption, captions, edits, position, relation
from dualtoken.data.scenes import SPLITS, Scene, SceneObject, scene
from dualtoken.eval.benchmarks import processes, write_benchmark
from dualtoken.eval.report import Share, share, table, write_json
from dualtoken.eval.scene_reader import SeenObject, background, read_scene, shows, shows_relation
from dualtoken.eval.understanding import Unseen, picture_of
from dualtoken.generation.sampling import DrawConfig, DrawEngine
from dualtoken.mllm.assistant import Assistant
from dualtoken.tokenizer.presets import scale_of

OUTSIDE_DB = 22.0  # what an edit leaves alone must come back at least this well
KINDS = {"one object": 1, "two objects with relation": 2}  # drawings, and how many objects are asked for
NEAR = 0.12  # share of the side: how far from its place an object still counts as there


@dataclass(frozen=True)
class EditVerdict:
    """An edited picture: was done what was asked, and how well the rest came back (PSNR outside the changed boxes)."""

    changed: bool
    outside: float  # dB

    @property
    def good(self) -> bool:
        return self.changed and self.outside >= OUTSIDE_DB


def generation(
    model: str = "mini",
    drawings: int = 300,
    edited: int = 300,
    batch_size: int = 50,
    split: Unseen = "test",
    seed: int = 0,
    guidance: float | None = None,
    semantic_codes: bool = True,
    output: str | None = None,
    pictures: str | None = None,
    benchmark: Literal["geneval", "wise", "genai-bench", "mjhq-30k"] | None = None,
    prompts: str | None = None,
    samples: int | None = None,
    template: str = "{}",
    engine: DrawEngine | None = None,
) -> dict[str, Any]:
    """Measure drawings of one object and of two with a relation, and edits, on unseen scenes; or draw a benchmark.

    Args:
        model: a preset, or the directory of a multimodal model.
        drawings: prompts of each kind.
        edited: edits.
        batch_size: prompts at once.
        split: "test" or "probe", neither seen in training.
        seed: of the choice of prompts; picture i is drawn from seed + i.
        guidance: in place of the model's own.
        semantic_codes: false draws with pixel codes alone.
        output: JSON file to write, with a page to read (.html) beside it; with --benchmark the folder that its scorer
            is to read.
        pictures: folder for sheets of the first pictures of each kind.
        benchmark: draw the prompts of a published benchmark in place of scenes, resumable, and shared by the processes
            of accelerate launch.
        prompts: with --benchmark: its file of prompts, or several with commas between them (WISE has three).
        samples: with --benchmark geneval: pictures of each prompt, 4 as published.
        template: with --benchmark: what the model is told, {} being the prompt, as "draw {}".
        engine: how pictures are computed (docs/benchmarks.md): graph and compiled are for GPUs, auto chooses; default:
            the model's (auto in new ones).
    """
    if benchmark is None and prompts is not None:
        raise UserError(f"--prompts {prompts}: say of which --benchmark they are")
    at_least_one(drawings=drawings, edited=edited, batch_size=batch_size)
    device = None if benchmark is None else str(processes().device)  # each process its own
    assistant = Assistant.open(model, device=device, engine=engine)
    config = assistant.model.draw_config
    config.guidance = config.guidance if guidance is None else guidance
    config.semantic_codes = config.semantic_codes and semantic_codes
    if benchmark is not None:
        how = {"samples": samples, "template": template, "batch_size": batch_size, "seed": seed}
        return write_benchmark(assistant, model, benchmark, prompts, output, config, **how)
    found: dict[str, Share] = {}
    sheets: dict[str, list[Image.Image]] = {}
    for kind, objects in KINDS.items():
        truths, prompts = draw_prompts(objects, drawings, split, seed)
        made = draw_all(assistant, prompts, config, batch_size, seed)
        arrays = [np.asarray(picture) for picture in made]
        found |= judge_drawings(kind, truths, prompts, arrays)
        sheets[kind] = made
    asked = draw_edits(edited, split, seed)
    made = edit_all(assistant, asked, config, batch_size, seed)
    verdicts = [judge_edit(edit, np.asarray(picture)) for edit, picture in zip(asked, made, strict=True)]
    found |= edit_shares(asked, verdicts)
    size = assistant.processor.image_processor.size
    sheets["edits"] = [p for e, m in zip(asked, made, strict=True) for p in (picture_of(e.before, size), m)]
    _print(found)
    if pictures is not None:
        for name, listed in sheets.items():
            save_sheet(listed, Path(pictures) / f"{name.replace(' ', '-')}.png")
    result = {
        "model": model, "scale": scale_of(assistant.model.vision_tokenizer), "split": split, "seed": seed,
        "guidance": config.guidance,
        "semantic_codes": config.semantic_codes, "shares": {name: value.numbers() for name, value in found.items()},
        "outside_psnr_median": float(np.median([v.outside for v in verdicts])),
        "protocol": {
            "data": f"prompts from unseen scenes, split {split}", "size": size, "sampling": asdict(config),
            "judge": "rules on the picture alone (eval/scene_reader.py)", "intervals": "95 %, Wilson",
        },
    }  # fmt: skip
    write_json(output, result)
    return result


def reader(
    drawings: int = 500, edited: int = 300, split: Unseen = "test", seed: int = 0, size: int = 48,
    output: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the reader that judges drawings and edits, on the true pictures of the same prompts: no model draws.

    Args:
        drawings: pictures of each kind.
        edited: edits.
        split: "test" or "probe", neither seen in training.
        seed: of the choice of prompts.
        size: side of the pictures in pixels.
        output: JSON file to write, with a page to read (.html) beside it.
    """
    at_least_one(drawings=drawings, edited=edited, size=size)
    found: dict[str, Share] = {}
    for kind, objects in KINDS.items():
        truths, prompts = draw_prompts(objects, drawings, split, seed)
        found |= judge_drawings(
            kind, truths, prompts, [truth.render(size) for truth in tqdm(truths, kind, disable=None)]
        )
    asked = draw_edits(edited, split, seed)
    found |= edit_shares(asked, [judge_edit(e, e.after.render(size)) for e in tqdm(asked, "edits", disable=None)])
    _print(found)
    result = {
        "split": split, "seed": seed, "shares": {name: value.numbers() for name, value in found.items()},
        "protocol": {
            "data": f"true pictures of unseen scenes, split {split}", "size": size, "intervals": "95 %, Wilson",
        },
    }  # fmt: skip
    write_json(output, result)
    return result


def _print(found: dict[str, Share]) -> None:
    print(table(("drawn", "right [95 %]", "of"), [(name, str(value), value.total) for name, value in found.items()]))


def draw_prompts(objects: int, number: int, split: str, seed: int) -> tuple[list[Scene], list[str]]:
    """Unseen scenes of so many objects (1 or 2, of different names) and prompts that fit them; two with a relation."""
    scenes, prompts = [], []
    for index in count():
        drawn = scene(index, split)
        if len(drawn.objects) == objects and len({thing.name for thing in drawn.objects}) == objects:
            rng = np.random.default_rng((SPLITS[split], seed, index, 6))
            scenes.append(drawn)
            prompts.append(f"draw {caption(drawn, rng) if objects == 1 else captions(drawn)[RELATION]}")
        if len(scenes) == number:
            return scenes, prompts


def draw_all(
    assistant: Assistant, prompts: list[str], config: DrawConfig, batch_size: int, seed: int
) -> list[Image.Image]:
    """One picture of each prompt, in order."""

    def draw(first: int, last: int) -> list[list[Image.Image]]:
        return assistant.draw(prompts[first:last], 1, config, list(range(seed + first, seed + last)))

    return _in_batches(len(prompts), batch_size, "drawings", draw)


def draw_edits(number: int, split: str, seed: int) -> list[Edit]:
    """Edits of unseen scenes, one a scene, the types in turn as far as the scenes allow."""
    found: list[Edit] = []
    for index in count():
        rng = np.random.default_rng((SPLITS[split], seed, index, 7))
        wanted = EDIT_TYPES[len(found) % len(EDIT_TYPES)]
        found += [edit for edit in edits(scene(index, split), rng) if edit.type == wanted][:1]
        if len(found) == number:
            return found


def edit_all(
    assistant: Assistant, asked: list[Edit], config: DrawConfig, batch_size: int, seed: int
) -> list[Image.Image]:
    """One result of each edit, in order."""
    size = assistant.processor.image_processor.size

    def change(first: int, last: int) -> list[list[Image.Image]]:
        group = asked[first:last]
        shown, told = [picture_of(e.before, size) for e in group], [e.instruction for e in group]
        return assistant.edit(shown, told, 1, config, list(range(seed + first, seed + last)))

    return _in_batches(len(asked), batch_size, "edits", change)


def judge_drawings(kind: str, truths: list[Scene], prompts: list[str], pictures: list[np.ndarray]) -> dict[str, Share]:
    """Are the asked colors and shapes there (of two objects: in the asked relation), and the background if asked?"""
    right, places = [], []
    for truth, prompt, picture in zip(truths, prompts, pictures, strict=True):
        named = [(thing.color, thing.shape) for thing in truth.objects]
        if len(named) == 1:
            right.append(shows(picture, *named[0]))
        else:
            right.append(shows_relation(picture, named[0], relation(*truth.objects), named[1]))
        if f"{truth.background} background" in prompt:
            places.append(background(picture) == truth.background)
    return {kind: share(right), f"{kind}: background": share(places)}


def judge_edit(edit: Edit, picture: np.ndarray) -> EditVerdict:
    """Judge an edited picture uint8 [S, S, 3] against what was asked, and against the picture before outside it."""
    before = [thing for thing in edit.before.objects if thing not in edit.after.objects]
    after = [thing for thing in edit.after.objects if thing not in edit.before.objects]
    seen = read_scene(picture)
    old, new = next(iter(before), None), next(iter(after), None)
    still = [s for s in seen if old is not None and _near(s, old)]
    done: list[SeenObject] = []
    if new is not None:
        done = [s for s in seen if (s.color, s.shape) == (new.color, new.shape)]
        done = [s for s in done if (_near(s, new) if edit.type == "recolor" else _place(s) == position(new))]
        if edit.type == "add":  # one of that name may have been there
            done = [s for s in done if not any(_near(s, thing) for thing in edit.before.objects)]
    changed = {
        "recolor": bool(done),
        "remove": not still,
        "add": bool(done),
        "move": bool(done) and not any((s.color, s.shape) == (old.color, old.shape) for s in still if s not in done),
    }[edit.type]
    boxes = [*before, *after, *done[:1]]
    truth = edit.before.render(picture.shape[0])
    return EditVerdict(changed, psnr_outside(truth, picture, boxes))


def psnr_outside(first: np.ndarray, second: np.ndarray, boxes: list[SceneObject | SeenObject]) -> float:
    """PSNR in dB of two pictures uint8 [S, S, 3] outside the boxes around some objects (two pixels wider)."""
    size, keep = first.shape[0], np.ones(first.shape[:2], dtype=bool)
    for box in boxes:
        reach = box.radius * 1.05 * size + 2
        rows, columns = ((int(max(0, c * size - reach)), int(np.ceil(c * size + reach))) for c in (box.y, box.x))
        keep[rows[0] : rows[1], columns[0] : columns[1]] = False
    error = (first[keep].astype(float) - second[keep].astype(float)) ** 2
    return float(10 * np.log10(255.0**2 / max(error.mean(), 1e-3))) if error.size else float("inf")


def edit_shares(asked: list[Edit], verdicts: list[EditVerdict]) -> dict[str, Share]:
    """Edits that did what was asked and left the rest, overall and by type; and each half of it alone."""
    by_type = defaultdict(list)
    for edit, verdict in zip(asked, verdicts, strict=True):
        by_type[edit.type].append(verdict.good)
    return {
        "edits": share(v.good for v in verdicts),
        "edits: changed as asked": share(v.changed for v in verdicts),
        f"edits: rest at {OUTSIDE_DB:.0f} dB or better": share(v.outside >= OUTSIDE_DB for v in verdicts),
        **{f"edits: {kind}": share(by_type[kind]) for kind in EDIT_TYPES},
    }


def save_sheet(pictures: list[Image.Image], path: Path, most: int = 64) -> None:
    """The first pictures in rows of eight, enlarged."""
    grid = make_grid(torch.stack([image_bytes(p) for p in pictures[:most]]), nrow=8, padding=2, pad_value=255)
    sheet = to_picture(grid)
    save_picture(sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST), path)


def _in_batches(
    total: int, batch_size: int, name: str, make: Callable[[int, int], list[list[Image.Image]]]
) -> list[Image.Image]:
    made: list[Image.Image] = []
    for first in tqdm(range(0, total, batch_size), desc=name, unit=" batches", disable=None):
        made += [several[0] for several in make(first, min(total, first + batch_size))]
    return made


def _near(seen: SeenObject, thing: SceneObject) -> bool:
    return float(np.hypot(seen.x - thing.x, seen.y - thing.y)) < NEAR


def _place(seen: SeenObject) -> str:
    return position(seen)  # it has x and y
