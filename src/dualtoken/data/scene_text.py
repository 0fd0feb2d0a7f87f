"""What can be said about a scene: captions, questions with answers, and edits with instructions.

Everything is derived from the structured truth of `scenes.Scene`, so it is always right; the choice among what
could be said comes from the generator that is passed in, so it repeats.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dualtoken.data.scenes import (
    COLORS,
    MAX_OBJECTS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    place,
    random_object,
)

NUMBERS = ("no", "one", "two", "three", "four")
QUESTION_TYPES = ("attribute", "count", "compare", "position", "exists")
BECAUSE = " : "  # between what is seen, what of it is asked about, and the answer
EDIT_TYPES = ("recolor", "remove", "add", "move")


@dataclass(frozen=True)
class Question:
    """A question about one picture with its only right answer, one or two words in lower case.

    `because` comes before it: what there is to see from top to bottom, then what of it the question is about. `about`
    is shorter: what the question is about alone.
    """

    type: str  # one of QUESTION_TYPES
    question: str
    answer: str
    because: str = ""
    about: str = ""

    @property
    def reply(self) -> str:
        """What a model learns to say: "a red star and a blue ring : a red star : one", or the answer alone."""
        return f"{self.because}{BECAUSE}{self.answer}" if self.because else self.answer

    @property
    def told(self) -> str:
        """The same by `about`, where there is one: "a red star at the top : top"."""
        return f"{self.about}{BECAUSE}{self.answer}" if self.about else self.reply


def answer_of(reply: str) -> str:
    """The answer in a reply, without what led to it."""
    return reply.rsplit(BECAUSE.strip(), 1)[-1].strip()


@dataclass(frozen=True)
class Edit:
    """A scene, the same scene changed, and the instruction that leads from one to the other."""

    type: str  # one of EDIT_TYPES
    before: Scene
    after: Scene
    instruction: str


def position(thing: SceneObject) -> str:
    """Where an object is, in words: "top left", "center", ..."""
    row = "top" if thing.y < 0.38 else "bottom" if thing.y > 0.62 else ""
    column = "left" if thing.x < 0.38 else "right" if thing.x > 0.62 else ""
    return f"{row} {column}".strip() or "center"


def describe(thing: SceneObject, detail: bool = True) -> str:
    """An object in words: "large striped red star", or without detail "red star"."""
    return f"{thing.size} {thing.texture} {thing.name}" if detail else thing.name


def relation(first: SceneObject, second: SceneObject) -> str:
    """How the first object lies to the second, along the axis on which they differ more."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def in_order(scene: Scene) -> Scene:
    """The scene with its objects from top to bottom, the order in which chats name them and pictures are drawn."""
    return replace(scene, objects=tuple(sorted(scene.objects, key=lambda thing: thing.y)))


def names(scene: Scene) -> str:
    """What is in a scene from top to bottom, without detail: "a red star and a blue ring"."""
    return _listed(in_order(scene).objects, lambda thing: thing.name)


def _listed(things: Iterable[SceneObject], say: Callable[[SceneObject], str]) -> str:
    return " and ".join(f"a {say(thing)}" for thing in things) or "none"


def located(scene: Scene) -> str:
    """What is where: "a small red star at the top left and a large blue ring at the bottom on a sky background"."""
    things = (f"a {thing.size} {thing.name} at the {position(thing)}" for thing in scene.objects)
    return f"{' and '.join(things)} on a {scene.background} background"


def captions(scene: Scene) -> list[str]:
    """Every kind of caption for a scene, from full detail to names only (lower case, no full stop)."""
    things, where = scene.objects, f"on a {scene.background} background"
    full = " and ".join(f"a {describe(thing)}" for thing in things)
    names = " and ".join(f"a {thing.name}" for thing in things)
    said = [f"{full} {where}", f"{names} {where}", names, f"{NUMBERS[len(things)]} objects : {names}"]
    if len(things) == 1:
        said[3] = located(scene)
    else:
        first, second = things[0], things[1]
        said.append(f"a {describe(first)} {relation(first, second)} a {describe(second)} {where}")
    return said


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption; full detail in half of the draws."""
    said = captions(scene)
    return said[0] if rng.random() < 0.5 else said[int(rng.integers(len(said)))]


def _unique(scene: Scene) -> list[SceneObject]:
    """Objects whose name (color and shape) no other object of the scene has."""
    counts = Counter(thing.name for thing in scene.objects)
    return [thing for thing in scene.objects if counts[thing.name] == 1]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of every type that the scene allows, each with exactly one right answer.

    A scene of one object has no "compare" question; "exists" comes once true and once false.
    """
    things, ordered, asked, seen = scene.objects, in_order(scene).objects, [], names(scene)

    def texture(thing: SceneObject) -> str:
        return f"{thing.texture} {thing.name}"

    def size(thing: SceneObject) -> str:
        return f"{thing.size} {thing.name}"

    def where(thing: SceneObject) -> str:
        return f"{thing.name} at the {position(thing)}"

    def steps(say: Callable[[SceneObject], str], *pair: SceneObject) -> str:
        """All that is seen, then the two that the question is about in its order."""
        return f"{_listed(ordered, say)}{BECAUSE}{_listed(pair, say)}"

    def with_texture(thing: SceneObject) -> str:
        return f"{thing.name} {thing.texture}"

    def with_size(thing: SceneObject) -> str:
        return f"{thing.name} {thing.size}"

    def of_shape(shape: str, say: Callable[[SceneObject], str]) -> str:
        """All that is seen, then what has the shape."""
        return f"{seen}{BECAUSE}{_listed((t for t in ordered if t.shape == shape), say)}"

    colors = Counter(thing.color for thing in things)
    shapes = Counter(thing.shape for thing in things)
    for thing in things:
        if shapes[thing.shape] == 1:
            whole = f"what color is the {thing.shape} ?"
            asked.append(Question("attribute", whole, thing.color, seen, f"a {thing.name}"))
        if colors[thing.color] == 1:
            whole = f"what shape is the {thing.color} object ?"
            asked.append(Question("attribute", whole, thing.shape, seen, f"a {thing.name}"))
    for thing in _unique(scene):
        whole, all_of_it = f"what texture has the {thing.name} ?", _listed(ordered, texture)
        asked.append(Question("attribute", whole, thing.texture, all_of_it, _listed([thing], with_texture)))
        whole, all_of_it = f"where is the {thing.name} ?", _listed(ordered, where)
        asked.append(Question("position", whole, position(thing), all_of_it, _listed([thing], where)))
    asked.append(Question("attribute", "what is the background ?", scene.background))
    asked.append(Question("count", "how many objects are there ?", NUMBERS[len(things)], seen))
    shape = SHAPES[rng.integers(len(SHAPES))]
    asked.append(
        Question(
            "count", f"how many objects are a {shape} ?", NUMBERS[shapes[shape]], of_shape(shape, lambda t: t.name)
        )
    )
    single = _unique(scene)
    for first, second in pairwise(single):
        pair = f"the {first.name} {{}} the {second.name}"
        larger = "yes" if first.radius > second.radius * 1.15 else "no"
        whole, about = f"is {pair.format('larger than')} ?", _listed((first, second), with_size)
        asked.append(Question("compare", whole, larger, steps(size, first, second), about))
        true = relation(first, second)
        words = (true, relation(second, first))[int(rng.integers(2))]
        whole, answer = f"is {pair.format(words)} ?", "yes" if words == true else "no"
        about = _listed((first, second), where)
        asked.append(Question("position", whole, answer, steps(where, first, second), about))
    present = things[int(rng.integers(len(things)))].name
    absent = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in {t.name for t in things}]
    for name, answer in ((present, "yes"), (absent[int(rng.integers(len(absent)))], "no")):
        verdicts = of_shape(name.split()[1], lambda t, name=name: f"{t.name} {'yes' if t.name == name else 'no'}")
        asked.append(Question("exists", f"is there a {name} ?", answer, verdicts))
    return asked


def edits(scene: Scene, rng: np.random.Generator) -> list[Edit]:
    """One edit of every type that the scene allows; instructions name objects that are unique in it."""
    made, single = [], _unique(scene)

    def swap(old: SceneObject, new: SceneObject) -> Scene:
        return replace(scene, objects=tuple(new if thing is old else thing for thing in scene.objects))

    if single:
        thing = single[int(rng.integers(len(single)))]
        rest = replace(scene, objects=tuple(other for other in scene.objects if other is not thing))
        color = str(rng.choice([name for name in COLORS if name != thing.color]))
        made.append(
            Edit(
                "recolor",
                scene,
                swap(thing, replace(thing, color=color, shade=COLORS[color])),
                f"make the {thing.name} {color}",
            )
        )
        if rest.objects:
            made.append(Edit("remove", scene, rest, f"remove the {thing.name}"))
        moved = place(thing, rest, rng)
        if position(moved) != position(thing):
            text = f"move the {thing.name} to the {position(moved)}"
            made.append(Edit("move", scene, swap(thing, moved), text))
    if len(scene.objects) < MAX_OBJECTS:
        small = random_object(rng, len(scene.objects) + 1)
        small = replace(small, radius=RADII[MAX_OBJECTS][0], size="small")
        added = place(small, scene, rng)
        after = replace(scene, objects=(*scene.objects, added))
        made.append(Edit("add", scene, after, f"add a {describe(added)} at the {position(added)}"))
    return made
