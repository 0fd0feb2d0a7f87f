"""Chats about scenes: the miniature's data for every task of Table 14.

Sample `index` of a task is a function of (split, seed, task, index). Pictures come from a pool of scenes, so that
their codes can be stored once; a scene's story is the scene, an edit of it, and an edit of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.scene_text import (
    EDIT_TYPES,
    NUMBERS,
    Edit,
    Question,
    caption,
    captions,
    edits,
    in_order,
    located,
    names,
    questions,
)
from dualtoken.data.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, SPLITS, TEXTURES, Scene, scene

TASKS = ("caption", "vqa", "text_to_image", "edit", "story", "text", "ask")
LINKS = 2  # edits in a story
DESCRIBE, DETAIL = "describe the picture", "describe the picture in detail"
WHERE = "say what is where in the picture"
RELATION = 4  # of the captions of several objects, the one that says how the first two lie to each other
RELATED = 0.7  # share of the drawings of two objects that are asked for with their relation
LOCATED = 0.4  # share of the other drawings that are asked for with all places
CROWDED = 0.5  # share of the questions to learn from that are about several objects for sure
TURNS = 2  # questions about one picture at most
DESCRIBED = 0.1  # share of descriptions in the task "ask"
UNCHANGED, REDRAW = 0.25, "draw it again"  # share of the edits to learn from that change nothing, and what asks for it
TEXTS, TEXT_SHARES = ("again", "change", "ask"), (0.15, 0.2, 0.65)  # chats without a picture, and how many of each
AGAIN, LENGTHS = "say again", (3, 16)  # words that are said again: fewest, and one more than most
WORDS = (*COLORS, *SHAPES, *TEXTURES, *SIZES, *BACKGROUNDS)


@dataclass
class SceneChatConfig:
    """The pool of pictures.

    Args:
        scenes: how many.
        stories: how many of them, the first, also have their edits.
        seed: of the world.
        drawn: shares of the drawings to learn from: of any scene, of one object, of two.
        edits: shares of the edits to learn from by type; default: as the scenes have them, "remove" least often.
    """

    scenes: int = 20000
    stories: int = 5000
    seed: int = 0
    drawn: tuple[float, float, float] = (0.15, 0.40, 0.45)
    edits: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stories <= self.scenes:
            raise UserError(f"--data.scenes.stories {self.stories}: give 1 to {self.scenes} (--data.scenes.scenes)")
        _check_shares("drawn", self.drawn)
        if self.edits is not None:
            if unknown := sorted(set(self.edits) - set(EDIT_TYPES)):
                raise UserError(f"--data.scenes.edits: {', '.join(unknown)} unknown; types are {', '.join(EDIT_TYPES)}")
            _check_shares("edits", tuple(self.edits.values()))


def _check_shares(name: str, shares: tuple[float, ...]) -> None:
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"--data.scenes.{name} {list(shares)}: give shares of 0 or more that add up to 1")


@lru_cache(maxsize=16384)
def story(index: int, split: str = "train", seed: int = 0) -> tuple[Edit, ...]:
    """Two edits of scene `index`, the second of what the first made; fewer where nothing can be named alone."""
    rng = np.random.default_rng((SPLITS[split], seed, index, 2))
    chain: list[Edit] = []
    for _ in range(LINKS):
        possible = edits(chain[-1].after if chain else scene(index, split, seed), rng)
        if not possible:
            break
        chain.append(possible[int(rng.integers(len(possible)))])
    return tuple(chain)


def narrate(edit: Edit) -> str:
    """An edit as an event: "make the red star blue" -> "then the red star turns blue"."""
    rest = edit.instruction.split(" ", 1)[1]
    if edit.type == "recolor":
        thing, color = rest.rsplit(" ", 1)
        return f"then {thing} turns {color}"
    if edit.type == "remove":
        return f"then {rest} goes away"
    if edit.type == "move":
        return "then " + rest.replace(" to the ", " moves to the ")
    return "then " + rest.replace(" at the ", " comes to the ")


def story_prompt(begin: Scene, pictures: int) -> str:
    """What asks for a story of two or three pictures that begins with a scene."""
    return f"tell a story in {NUMBERS[pictures]} pictures about {names(begin)}"


class SceneChats:
    """Chats of all tasks over a pool of scenes: `sample(task, index)`."""

    tasks = TASKS

    def __init__(self, config: SceneChatConfig, split: str = "train"):
        self.config, self.split = config, split

    def picture(self, index: int, link: int = 0) -> Picture:
        """Scene `index`, or what the first `link` edits of its story made of it."""
        name = f"{self.split}-{self.config.seed}-{index}"
        if link == 0:
            return Picture(name, scene(index, self.split, self.config.seed))
        after = self._story_of(index)[link - 1].after
        return Picture(f"{name}-edit-{link}", after, edited=self.picture(index, link - 1))

    def pictures(self) -> "list[Picture]":
        """The whole pool: what has to be encoded to store all codes. Scenes are drawn when asked for."""
        scenes, stories = self.config.scenes, self.config.stories
        places = [(i, 0) for i in range(scenes)]
        for link in range(LINKS):
            places += [(i, link + 1) for i in range(stories) if len(self._story_of(i)) > link]
        return _Pool(self, places)  # type: ignore[return-value]

    def sample(self, task: str, index: int) -> ChatSample:
        """Sample `index` of a task. Raises UserError for an unknown task."""
        if task not in TASKS:
            raise UserError(f"--data.mixture: unknown task {task!r}; the tasks are {', '.join(TASKS)}")
        rng = np.random.default_rng((SPLITS[self.split], self.config.seed, TASKS.index(task), index, 3))
        pool = self.config.stories if task in ("edit", "story") else self.config.scenes
        number = int(rng.integers(pool)) if self.split == "train" else index % pool
        kind = None
        if self.split == "train" and task == "edit" and self.config.edits:
            kind = str(rng.choice(list(self.config.edits), p=list(self.config.edits.values())))
        fits = self._wanted(task, kind, rng)
        number = next((n for n in ((number + i) % pool for i in range(pool)) if fits(n)), None)
        if number is None:
            raise UserError(f"--data.scenes: none of {pool} scenes suits the task {task}; give more")
        make = getattr(self, f"_{task}")
        messages = make(number, rng) if kind is None else make(number, rng, kind)
        return ChatSample(messages, task, f"{task}-{self.split}-{self.config.seed}-{index}")

    def _wanted(self, task: str, kind: str | None, rng: np.random.Generator) -> Callable[[int], bool]:
        """Which scenes a sample may be about; those to learn from are chosen so that what is hard comes often."""
        if task in ("edit", "story"):
            return lambda number: bool(self._links(number, kind))
        allowed = {1, 2, 3, 4}
        if self.split == "train" and task == "text_to_image":
            allowed = (allowed, {1}, {2})[int(rng.choice(3, p=self.config.drawn))]
        elif self.split == "train" and task in ("vqa", "ask") and rng.random() < CROWDED:
            allowed = {2, 3, 4}
        return lambda number: len(self._scene(number).objects) in allowed

    def _story_of(self, number: int) -> tuple[Edit, ...]:
        return story(number, self.split, self.config.seed)

    def _links(self, number: int, kind: str | None) -> list[int]:
        """Which edits of a story are of a type, of any where it is None."""
        return [link for link, edit in enumerate(self._story_of(number)) if kind in (None, edit.type)]

    def _scene(self, number: int) -> Scene:
        return scene(number, self.split, self.config.seed)

    def _caption(self, number: int, rng: np.random.Generator, words_first: bool = False) -> tuple[Message, ...]:
        drawn = in_order(self._scene(number))
        asked = (DESCRIBE, DETAIL, WHERE)[int(rng.integers(3))]
        said = {DESCRIBE: caption(drawn, rng), DETAIL: captions(drawn)[0], WHERE: located(drawn)}[asked]
        told = (asked, self.picture(number)) if words_first else (self.picture(number), asked)
        return Message("user", told), Message("assistant", (said,))

    def _vqa(self, number: int, rng: np.random.Generator) -> tuple[Message, ...]:
        return _turns(questions(self._scene(number), rng), self.picture(number), rng)

    def _ask(self, number: int, rng: np.random.Generator) -> tuple[Message, ...]:
        """As "vqa" and "caption", the words before the picture; answers begin with what alone is asked about."""
        if rng.random() < DESCRIBED:
            return self._caption(number, rng, words_first=True)
        return _turns(questions(self._scene(number), rng), self.picture(number), rng, words_first=True)

    def _text_to_image(self, number: int, rng: np.random.Generator) -> tuple[Message, ...]:
        drawn = self._scene(number)
        if len(drawn.objects) == 2 and rng.random() < RELATED:
            asked = captions(drawn)[RELATION]
        else:
            ordered = in_order(drawn)
            asked = located(ordered) if rng.random() < LOCATED else caption(ordered, rng)
        prompt = f"draw {asked}" if rng.random() < 0.5 else asked
        return Message("user", (prompt,)), Message("assistant", (self.picture(number),))

    def _edit(self, number: int, rng: np.random.Generator, kind: str | None = None) -> tuple[Message, ...]:
        chain, links = self._story_of(number), self._links(number, kind)
        link = links[int(rng.integers(len(links)))]
        shown, drawn, asked = self.picture(number, link), self.picture(number, link + 1), chain[link].instruction
        if self.split == "train" and rng.random() < UNCHANGED:
            drawn, asked = shown, REDRAW
        # Words first, so that each position of the drawing is always as far behind the same position of the picture.
        return Message("user", (asked, shown)), Message("assistant", (drawn,))

    def _story(self, number: int, rng: np.random.Generator) -> tuple[Message, ...]:
        begin, chain = self._scene(number), self._story_of(number)
        links = int(rng.integers(1, len(chain) + 1))
        told: list[str | Picture] = [f"first there is {names(begin)}", self.picture(number)]
        for k in range(links):
            told += [narrate(chain[k]), self.picture(number, k + 1)]
        return Message("user", (story_prompt(begin, links + 1),)), Message("assistant", tuple(told))

    def _text(self, number: int, rng: np.random.Generator) -> tuple[Message, ...]:
        """Words alone: said again, changed as told, or asked about."""
        kind = TEXTS[int(rng.choice(len(TEXTS), p=TEXT_SHARES))]
        if kind == "again":
            said = " ".join(rng.choice(WORDS, int(rng.integers(*LENGTHS))))
            return Message("user", (f"{AGAIN} : {said}",)), Message("assistant", (said,))
        drawn = in_order(self._scene(number))
        possible = edits(drawn, rng)
        if kind == "change" and possible:
            edit = possible[int(rng.integers(len(possible)))]
            before, after = located(drawn), located(in_order(edit.after))
            return Message("user", (f"{before} . {edit.instruction}",)), Message("assistant", (after,))
        asked = questions(drawn, rng)
        if rng.random() < 0.5:
            about, asked = captions(drawn)[0], [q for q in asked if q.type not in ("compare", "position")]
        else:
            about, asked = located(drawn), [q for q in asked if "texture" not in q.question]
        return _turns(asked, f"{about} .", rng)


def _turns(
    possible: list[Question], about: str | Picture, rng: np.random.Generator, words_first: bool = False
) -> tuple[Message, ...]:
    """One question or more, each of a type chosen first, so that all types come equally often."""
    messages: list[Message] = []
    for _ in range(int(rng.integers(1, TURNS + 1))):
        kinds = sorted({q.type for q in possible})
        kind = kinds[int(rng.integers(len(kinds)))]
        group = [q for q in possible if q.type == kind]
        chosen = group[int(rng.integers(len(group)))]
        possible = [q for q in possible if q is not chosen]
        said: tuple[str | Picture, ...] = (chosen.question,)
        if not messages:
            said = (f"{about} {chosen.question}",) if isinstance(about, str) else (about, chosen.question)
            said = said[::-1] if words_first else said
        messages += [Message("user", said), Message("assistant", (chosen.told if words_first else chosen.reply,))]
    return tuple(messages)


class _Pool:
    """The pool as a sequence whose scenes are made when asked for."""

    def __init__(self, chats: SceneChats, places: list[tuple[int, int]]):
        self.chats, self.places = chats, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> Picture:
        return self.chats.picture(*self.places[at])
