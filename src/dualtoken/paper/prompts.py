"""Prompts about scenes that can be judged from the drawn picture by rule: Table 5's skills, and GenEval's tasks.

GenAI-Bench and GenEval ask for photographs and judge with learned models; here the world is drawn and the reader of
`eval/scene_reader.py` judges. Kinds of prompts correspond, numbers cannot be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dualtoken.data.scene_text import NUMBERS
from dualtoken.data.scenes import BACKGROUNDS, COLORS, SHAPES, TEXTURES
from dualtoken.eval.report import Share, share
from dualtoken.eval.scene_reader import SeenObject, background, read_scene, shows, shows_relation

Thing = tuple[str, str]  # color and shape
RELATIONS = ("left of", "right of", "above", "below")
LARGER = 1.15  # ratio of radii from which one is called larger, as in the world's questions


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and whether a picture uint8 [S, S, 3] shows it."""

    kind: str
    text: str
    holds: Callable[[np.ndarray], bool]


def skill_prompts(number: int, seed: int) -> list[Prompt]:
    """`number` prompts of each skill of Table 5: attribute, count, differ, compare, negate, universal."""
    return [make(np.random.default_rng((seed, place, i))) for place, make in enumerate(SKILLS) for i in range(number)]


def geneval_prompts(number: int, seed: int) -> list[Prompt]:
    """`number` prompts of each of GenEval's six tasks."""
    return [make(np.random.default_rng((seed, 9, place, i))) for place, make in enumerate(TASKS) for i in range(number)]


def judge(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> dict[str, Share]:
    """Right ones by kind, in order of appearance."""
    verdicts: dict[str, list[bool]] = {}
    for prompt, picture in zip(prompts, pictures, strict=True):
        verdicts.setdefault(prompt.kind, []).append(prompt.holds(picture))
    return {kind: share(found) for kind, found in verdicts.items()}


def _things(rng: np.random.Generator, number: int) -> list[Thing]:
    """Things that differ in color and in shape."""
    colors = rng.permutation(list(COLORS))[:number]
    return [(str(c), str(s)) for c, s in zip(colors, rng.permutation(SHAPES)[:number], strict=True)]


def _name(thing: Thing) -> str:
    return f"a {thing[0]} {thing[1]}"


def _find(picture: np.ndarray, thing: Thing) -> SeenObject | None:
    return next((seen for seen in read_scene(picture) if (seen.color, seen.shape) == thing), None)


def _attribute(rng: np.random.Generator) -> Prompt:
    (color, shape), place = _things(rng, 1)[0], str(rng.choice(BACKGROUNDS))
    text = f"draw a large {rng.choice(TEXTURES)} {color} {shape} on a {place} background"
    return Prompt("attribute", text, lambda p: shows(p, color, shape) and background(p) == place)


def _count(rng: np.random.Generator) -> Prompt:
    number = int(rng.integers(2, 5))
    listed = " and ".join(_name(thing) for thing in _things(rng, number))
    return Prompt("count", f"draw {NUMBERS[number]} objects : {listed}", lambda p: len(read_scene(p)) == number)


def _differ(rng: np.random.Generator) -> Prompt:
    (first, shape), (second, _) = _things(rng, 2)
    text = f"draw {_name((first, shape))} and {_name((second, shape))}"
    return Prompt("differ", text, lambda p: shows(p, first, shape) and shows(p, second, shape))


def _compare(rng: np.random.Generator) -> Prompt:
    large, small = _things(rng, 2)

    def holds(picture: np.ndarray) -> bool:
        one, other = _find(picture, large), _find(picture, small)
        return one is not None and other is not None and one.radius > LARGER * other.radius

    return Prompt("compare", f"draw a large {' '.join(large)} and a small {' '.join(small)}", holds)


def _negate(rng: np.random.Generator) -> Prompt:
    wanted, (_, unwanted) = _things(rng, 2)

    def holds(picture: np.ndarray) -> bool:
        return shows(picture, *wanted) and all(seen.shape != unwanted for seen in read_scene(picture))

    return Prompt("negate", f"draw {_name(wanted)} and no {unwanted}", holds)


def _universal(rng: np.random.Generator) -> Prompt:
    color, number = str(rng.choice(list(COLORS))), int(rng.integers(2, 5))

    def holds(picture: np.ndarray) -> bool:
        seen = read_scene(picture)
        return len(seen) >= 2 and all(one.color == color for one in seen)

    return Prompt("universal", f"draw {NUMBERS[number]} objects : all of them {color}", holds)


def _single(rng: np.random.Generator) -> Prompt:
    _, shape = _things(rng, 1)[0]
    return Prompt("single object", f"draw a {shape}", lambda p: any(seen.shape == shape for seen in read_scene(p)))


def _two(rng: np.random.Generator) -> Prompt:
    shapes = {shape for _, shape in _things(rng, 2)}
    text = "draw " + " and ".join(f"a {shape}" for shape in sorted(shapes))
    return Prompt("two objects", text, lambda p: shapes <= {seen.shape for seen in read_scene(p)})


def _counting(rng: np.random.Generator) -> Prompt:
    (_, shape), number = _things(rng, 1)[0], int(rng.integers(2, 5))
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    text = f"draw {NUMBERS[number]} {plural}"
    return Prompt("counting", text, lambda p: sum(seen.shape == shape for seen in read_scene(p)) == number)


def _colors(rng: np.random.Generator) -> Prompt:
    thing = _things(rng, 1)[0]
    return Prompt("colors", f"draw {_name(thing)}", lambda p: shows(p, *thing))


def _position(rng: np.random.Generator) -> Prompt:
    (first, second), words = _things(rng, 2), str(rng.choice(RELATIONS))
    text = f"draw {_name(first)} {words} {_name(second)}"
    return Prompt("position", text, lambda p: shows_relation(p, first, words, second))


def _color_attribution(rng: np.random.Generator) -> Prompt:
    first, second = _things(rng, 2)
    text = f"draw {_name(first)} and {_name(second)}"
    return Prompt("color attribution", text, lambda p: shows(p, *first) and shows(p, *second))


SKILLS = (_attribute, _count, _differ, _compare, _negate, _universal)
TASKS = (_single, _two, _counting, _colors, _position, _color_attribution)
