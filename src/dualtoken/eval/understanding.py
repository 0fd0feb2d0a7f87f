"""`dualtoken eval understanding`: questions about unseen scenes, and captions of them."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from dualtoken.core.errors import at_least_one
from dualtoken.data.scene_chat import DETAIL
from dualtoken.data.scene_text import QUESTION_TYPES, Question, answer_of, questions
from dualtoken.data.scenes import BACKGROUNDS, COLORS, SHAPES, SPLITS, TEXTURES, Scene, scene
from dualtoken.eval.report import Share, share, table, write_json
from dualtoken.mllm.assistant import Assistant
from dualtoken.tokenizer.presets import scale_of

Unseen = Literal["test", "probe"]  # splits of the world that nothing learns from
THINGS = {*COLORS, *SHAPES, *TEXTURES, *BACKGROUNDS}


@dataclass(frozen=True)
class Asked:
    """A question about a scene, and what the model said."""

    scene: int
    question: Question
    said: str

    @property
    def right(self) -> bool:
        return answer_of(self.said) == self.question.answer


def understanding(
    model: str = "mini",
    questions: int = 300,
    captions: int = 300,
    batch_size: int = 64,
    split: Unseen = "test",
    seed: int = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Measure answers to questions by type, beside the commonest answer, and captions, on unseen scenes.

    Args:
        model: a preset, or the directory of a multimodal model.
        questions: how many of each type.
        captions: how many scenes are described.
        batch_size: prompts at once.
        split: "test" or "probe", neither seen in training.
        seed: of the choice of questions.
        output: JSON file to write, with a page to read (.html) beside it.
    """
    at_least_one(questions=questions, captions=captions, batch_size=batch_size)
    assistant = Assistant.open(model)
    asked = ask_questions(assistant, draw_questions(questions, split, seed), batch_size, split)
    rows, by_type = [], {}
    for kind in QUESTION_TYPES:
        group = [a for a in asked if a.question.type == kind]
        right, usual = share(a.right for a in group), commonest(group)
        by_type[kind] = right.numbers() | {"commonest_answer": usual.value}
        rows.append((kind, right.total, str(right), f"{100 * usual.value:.1f} %"))
    overall, usual = share(a.right for a in asked), commonest(asked)
    rows.append(("all", overall.total, str(overall), f"{100 * usual.value:.1f} %"))
    print(table(("question type", "asked", "right [95 %]", "commonest answer"), rows))
    named = describe_scenes(assistant, captions, batch_size, split)
    print(table(("caption names", "right [95 %]"), [(name, str(value)) for name, value in named.items()]))
    result = {
        "model": model, "scale": scale_of(assistant.model.vision_tokenizer), "split": split, "seed": seed,
        "vqa": overall.numbers() | {"commonest_answer": usual.value}, "vqa_by_type": by_type,
        "captions": {name: value.numbers() for name, value in named.items()},
        "protocol": {
            "data": f"unseen scenes, split {split}", "size": assistant.processor.image_processor.size,
            "answers": "the likeliest words; right if equal to the answer, behind the last colon of reasons",
            "intervals": "95 %, Wilson",
        },
    }  # fmt: skip
    write_json(output, result)
    return result


def draw_questions(number: int, split: str, seed: int) -> list[tuple[int, Question]]:
    """`number` questions of every type, with the number of the scene that each is about."""
    wanted, found = Counter(dict.fromkeys(QUESTION_TYPES, number)), []
    for index in count():
        rng = np.random.default_rng((SPLITS[split], seed, index, 5))
        possible = questions(scene(index, split), rng)
        for place in rng.permutation(len(possible)):
            if wanted[possible[place].type] > 0:
                wanted[possible[place].type] -= 1
                found.append((index, possible[place]))
        if not +wanted:
            return found


def ask_questions(assistant: Assistant, asked: list[tuple[int, Question]], batch_size: int, split: str) -> list[Asked]:
    """Every question alone, with its picture."""
    size, answers = assistant.processor.image_processor.size, []
    for first in tqdm(range(0, len(asked), batch_size), desc="questions", unit=" batches", disable=None):
        group = asked[first : first + batch_size]
        chats = [[assistant.about([picture_of(scene(index, split), size)], q.question)] for index, q in group]
        said = assistant.ask(chats)
        answers += [Asked(index, question, text) for (index, question), text in zip(group, said, strict=True)]
    return answers


def picture_of(drawn: Scene, size: int) -> Image.Image:
    """A scene as a picture of `size` px."""
    return Image.fromarray(drawn.render(size))


def commonest(asked: list[Asked]) -> Share:
    """What one would score who knows the commonest answer to each form of question and sees nothing."""
    forms: dict[str, Counter] = defaultdict(Counter)
    for one in asked:
        words = one.question.question.split()
        form = " ".join("_" if word in THINGS else word for word in words)
        forms[form][one.question.answer] += 1
    return Share(sum(answers.most_common(1)[0][1] for answers in forms.values()), len(asked))


def describe_scenes(assistant: Assistant, number: int, batch_size: int, split: str) -> dict[str, Share]:
    """What captions say of the largest object of each scene, and of the background."""
    size, verdicts = assistant.processor.image_processor.size, defaultdict(list)
    for first in tqdm(range(0, number, batch_size), desc="captions", unit=" batches", disable=None):
        drawn = [scene(i, split) for i in range(first, min(number, first + batch_size))]
        said = assistant.ask([[assistant.about([picture_of(s, size)], DETAIL)] for s in drawn], max_new_tokens=80)
        for one, text in zip(drawn, said, strict=True):
            main = max(one.objects, key=lambda thing: thing.radius)
            words = f" {text} "
            verdicts["color and shape of the main object"].append(f" {main.name} " in words)
            verdicts["its texture too"].append(f" {main.texture} {main.name} " in words)
            verdicts["background"].append(f" {one.background} background" in words)
            verdicts["number of objects"].append(sum(words.count(f" {s} ") for s in SHAPES) == len(one.objects))
    return {name: share(values) for name, values in verdicts.items()}
