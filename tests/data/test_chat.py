from collections import Counter

import numpy as np
import pytest
import torch

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message, Picture, StoredCodes, by_name
from dualtoken.data.collate import IGNORE
from dualtoken.data.scene_chat import (
    AGAIN,
    CROWDED,
    REDRAW,
    RELATION,
    TASKS,
    TURNS,
    WORDS,
    SceneChatConfig,
    SceneChats,
    narrate,
    story,
    story_prompt,
)
from dualtoken.data.scene_text import (
    NUMBERS,
    QUESTION_TYPES,
    answer_of,
    captions,
    in_order,
    located,
    position,
    questions,
)
from dualtoken.data.scenes import scene
from dualtoken.mllm.parts import SmallLLMConfig, train_chat_tokenizer
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.training.mllm import scene_texts

CONFIG = SceneChatConfig(scenes=60, stories=30)
MANY = 200


@pytest.fixture(scope="module")
def chats():
    return SceneChats(CONFIG)


def kinds(sample):
    """Roles, and what each message holds: t for text, p for a picture."""
    return [(m.role, "".join("p" if isinstance(part, Picture) else "t" for part in m.content)) for m in sample.messages]


def texts(message):
    return [part for part in message.content if isinstance(part, str)]


FORMS = {
    "caption": lambda k: k == [("user", "pt"), ("assistant", "t")],
    "vqa": lambda k: (
        k[0] == ("user", "pt") and set(k[2::2]) <= {("user", "t")} and set(k[1::2]) == {("assistant", "t")}
    ),
    "text_to_image": lambda k: k == [("user", "t"), ("assistant", "p")],
    "edit": lambda k: k == [("user", "tp"), ("assistant", "p")],
    "story": lambda k: k[0] == ("user", "t") and k[1:] in ([("assistant", "tptp")], [("assistant", "tptptp")]),
    "ask": lambda k: (
        k[0] == ("user", "tp") and set(k[2::2]) <= {("user", "t")} and set(k[1::2]) == {("assistant", "t")}
    ),
    "text": lambda k: set(k[::2]) == {("user", "t")} and set(k[1::2]) == {("assistant", "t")},
}


@pytest.mark.parametrize("task", TASKS)
def test_samples_have_the_form_of_their_task(chats, task):
    names = set()
    for index in range(MANY):
        sample = chats.sample(task, index)
        assert FORMS[task](kinds(sample)) and sample.task == task and 2 <= len(sample.messages) <= 2 * TURNS
        assert len(sample.messages) % 2 == 0 and all(part for m in sample.messages for part in texts(m))
        assert sample.draws == (task in ("text_to_image", "edit", "story"))
        names.add(sample.name)
    assert len(names) == MANY


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_a_function_of_task_and_number(chats, task):
    other = SceneChats(SceneChatConfig(60, 30))
    asked = [chats.sample(task, index) for index in range(40)]
    assert [other.sample(task, index) for index in reversed(range(40))] == asked[::-1]
    assert len({s.messages for s in asked}) > 20
    seeded = SceneChats(SceneChatConfig(60, 30, seed=1))
    assert [s.messages for s in asked] != [seeded.sample(task, index).messages for index in range(40)]
    assert set(by_name(asked)).isdisjoint(by_name(seeded.sample(task, index) for index in range(40)))


def test_training_and_test_never_share_a_picture(chats):
    test = SceneChats(CONFIG, "test")
    ours, theirs = ([c.sample(t, i) for t in TASKS for i in range(60)] for c in (chats, test))
    pictures = [by_name(samples) for samples in (ours, theirs)]
    assert pictures[0].keys().isdisjoint(pictures[1])
    assert {p.drawing for p in pictures[0].values()}.isdisjoint({p.drawing for p in pictures[1].values()})
    assert {s.name for s in ours}.isdisjoint({s.name for s in theirs})


def test_what_is_said_is_true_of_the_picture(chats):
    rng = np.random.default_rng(0)
    for index in range(MANY):
        sample = chats.sample("caption", index)
        shown = sample.pictures[0].drawing
        assert texts(sample.messages[1])[0] in [*captions(in_order(shown)), located(in_order(shown))]
        sample = chats.sample("text_to_image", index)
        shown = sample.pictures[0].drawing
        asked = texts(sample.messages[0])[0].removeprefix("draw ")
        assert asked in [*captions(in_order(shown)), *captions(shown)[RELATION:], located(in_order(shown))]
        sample = chats.sample(("vqa", "ask")[index % 2], index)
        shown = sample.pictures[0].drawing
        possible = {(q.question, q.answer) for _ in range(3) for q in questions(shown, rng)}
        asked = [texts(m)[0] for m in sample.messages[::2]]
        assert len(set(asked)) == len(asked)
        if "picture" in asked[0]:  # "ask" describes too
            assert texts(sample.messages[1])[0] in [*captions(in_order(shown)), located(in_order(shown))]
            continue
        for question, reply in zip(asked, (texts(m)[0] for m in sample.messages[1::2]), strict=True):
            answer = answer_of(reply)
            if question.startswith("is there a "):  # of one of many things that might be there
                there = question[len("is there a ") : -2] in {thing.name for thing in shown.objects}
                assert answer == ("yes" if there else "no")
            elif question.startswith("how many objects are a "):
                count = [thing.shape for thing in shown.objects].count(question.split()[-2])
                assert answer == NUMBERS[count]
            elif not question.startswith("is the "):  # which way round a relation is asked for is drawn
                assert (question, answer) in possible


def test_edits_to_learn_from_can_be_asked_for_by_type():
    as_they_come = SceneChats(SceneChatConfig(200, 200))
    chosen = SceneChats(SceneChatConfig(200, 200, edits={"remove": 0.75, "move": 0.25}))
    kinds = [], []
    for index in range(120):
        for chats, found in zip((as_they_come, chosen), kinds, strict=True):
            asked = chats.sample("edit", index).messages[0].content[0]
            found.append(asked.split()[0])
    assert {"make", "add", "move", "remove"} <= set(kinds[0])
    rest = [kind for kind in kinds[1] if kind != REDRAW.split()[0]]
    assert set(rest) == {"remove", "move"} and 0.6 < rest.count("remove") / len(rest) < 0.9
    unseen = SceneChats(SceneChatConfig(200, 200, edits={"remove": 1.0}), "test")
    assert {unseen.sample("edit", i).messages[0].content[0].split()[0] for i in range(40)} > {"remove"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drawn": (0.5, 0.5, 0.5)}, "--data.scenes.drawn [0.5, 0.5, 0.5]: give shares of 0 or more that add up to 1"),
        ({"drawn": (1.5, -0.5, 0.0)}, "--data.scenes.drawn"),
        ({"edits": {}}, "--data.scenes.edits []"),
        ({"edits": {"paint": 1.0}}, "paint unknown; types are recolor, remove, add, move"),
    ],
)
def test_shares_that_cannot_be_are_a_mistake(options, words):
    with pytest.raises(UserError) as caught:
        SceneChatConfig(**options)
    assert words in str(caught.value)


def test_most_drawings_to_learn_from_are_of_few_objects():
    chats = SceneChats(SceneChatConfig(400, 1))
    drawn = [chats.sample("text_to_image", index).pictures[0].drawing for index in range(400)]
    for count in (1, 2):
        share = sum(len(shown.objects) == count for shown in drawn) / len(drawn)
        of_all = sum(len(scene(number).objects) == count for number in range(400)) / 400
        assert abs(share - chats.config.drawn[count] - chats.config.drawn[0] * of_all) < 0.08
    pairs = SceneChats(SceneChatConfig(400, 1, drawn=(0.0, 0.0, 1.0)))
    assert all(len(pairs.sample("text_to_image", index).pictures[0].drawing.objects) == 2 for index in range(50))
    several = [len(chats.sample("vqa", index).pictures[0].drawing.objects) > 1 for index in range(400)]
    assert CROWDED + 0.1 < sum(several) / 400 < 0.85


def test_types_of_questions_come_equally_often_where_there_are_several_objects():
    chats, kinds = SceneChats(SceneChatConfig(400, 1)), Counter()
    for index in range(400):
        sample = chats.sample("vqa", index)
        shown, question = sample.pictures[0].drawing, texts(sample.messages[0])[0]
        if len({thing.name for thing in shown.objects}) == len(shown.objects) > 1:
            possible = (q for i in range(20) for q in questions(shown, np.random.default_rng(i)))
            kinds[next((q.type for q in possible if q.question == question), "exists")] += 1
    assert min(kinds[kind] for kind in QUESTION_TYPES) > 0.12 * kinds.total()


def test_objects_are_named_from_top_to_bottom_with_their_places():
    for number in range(50):
        shown = scene(number)
        ordered = in_order(shown)
        assert sorted(ordered.objects, key=lambda t: t.y) == list(ordered.objects)
        assert set(ordered.objects) == set(shown.objects) and ordered.background == shown.background
        said = located(ordered)
        places = [said.index(f"a {t.size} {t.name} at the {position(t)}") for t in ordered.objects]
        assert places == sorted(places) and said.endswith(f"on a {shown.background} background")


def test_edits_and_stories_follow_the_chain_of_their_scene(chats):
    again = 0
    for index in range(MANY):
        edit = chats.sample("edit", index)
        before, after = (p.drawing for p in edit.pictures)
        number, *linked = edit.pictures[0].name.split("-")[2:]  # "12", or "12-edit-1"
        if texts(edit.messages[0]) == [REDRAW]:
            again += 1
            assert edit.pictures[1] == edit.pictures[0]
        else:
            made = story(int(number))[int(linked[-1]) if linked else 0]
            assert edit.pictures[1].edited == edit.pictures[0]
            assert (made.before, made.after) == (before, after) and texts(edit.messages[0]) == [made.instruction]
        told = chats.sample("story", index)
        number = int(told.pictures[0].name.split("-")[2])
        chain = story(number)[: len(told.pictures) - 1]
        assert [p.drawing for p in told.pictures] == [scene(number), *(e.after for e in chain)]
        assert texts(told.messages[1])[1:] == [narrate(e) for e in chain]
        assert texts(told.messages[0]) == [story_prompt(scene(number), len(told.pictures))]
    assert 0 < again < 0.5 * MANY
    test = SceneChats(CONFIG, "test")
    assert all(texts(test.sample("edit", index).messages[0]) != [REDRAW] for index in range(MANY))


def test_chats_of_words_alone_repeat_change_and_answer(chats):
    kinds = Counter()
    for index in range(MANY):
        sample = chats.sample("text", index)
        assert not sample.pictures
        told, said = texts(sample.messages[0])[0], texts(sample.messages[1])[0]
        if told.startswith(AGAIN):
            kinds["again"] += 1
            assert told == f"{AGAIN} : {said}" and set(said.split()) <= set(WORDS)
        elif told.endswith("?"):
            kinds["ask"] += 1
            about = told.split(" . ")[0]
            for message in sample.messages[1::2]:  # what is said to be there is told before
                reply = texts(message)[0]
                if answer_of(reply) not in ("yes", *NUMBERS):
                    assert set(answer_of(reply).split()) <= {*about.split(), "no"}
        else:
            kinds["change"] += 1
            before, _, instruction = told.partition(" . ")
            verb = instruction.split()[0]
            many = before.count(" and ") + {"add": 1, "remove": -1}.get(verb, 0)
            assert verb in ("add", "remove", "make", "move") and said.count(" and ") == many and said != before
    assert min(kinds.values()) > 0.1 * MANY and set(kinds) == {"again", "change", "ask"}


def test_the_pool_holds_every_picture_of_every_sample_once(chats):
    pool = chats.pictures()
    names = [pool[i].name for i in range(len(pool))]
    assert len(set(names)) == len(names) and len(names) > CONFIG.scenes
    used = by_name(chats.sample(task, index) for task in TASKS for index in range(MANY))
    assert used.keys() <= set(names)
    held = dict(zip(names, (pool[i] for i in range(len(pool))), strict=True))
    assert all(held[name].drawing == picture.drawing for name, picture in used.items())


def test_unseen_samples_go_through_the_pool_in_order():
    test = SceneChats(CONFIG, "test")
    assert [test.sample("caption", i).pictures[0].name for i in (0, 1, 61)] == [
        "test-0-0",
        "test-0-1",
        "test-0-1",
    ]


@pytest.mark.parametrize("stories", [0, 61])
def test_pools_that_cannot_be_are_one_line(stories):
    with pytest.raises(UserError, match=rf"--data\.scenes\.stories {stories}: give 1 to 60"):
        SceneChats(SceneChatConfig(60, stories))


def test_unknown_tasks_are_one_line(chats):
    with pytest.raises(UserError, match="unknown task 'poem'; the tasks are caption, vqa"):
        chats.sample("poem", 0)


def test_every_sample_fits_256_tokens_with_36_positions():
    text = train_chat_tokenizer(scene_texts(SceneChatConfig(), per_task=40), SmallLLMConfig().vocab_size, 1024)
    processor = DualTokenProcessor(DualTokenImageProcessor(48), text, positions=36)
    chats = SceneChats(SceneChatConfig())
    for task in TASKS:
        tokens = [processor.encode(chats.sample(task, index), pictures=False) for index in range(MANY)]
        assert max(len(t.ids) for t in tokens) <= 256, task
        assert all((t.labels != IGNORE).any() for t in tokens)


# -- stored codes --


def stored(names):
    torch.manual_seed(0)
    count = len(names)
    return StoredCodes(DualCodes(torch.randint(9, (count, 4, 2)), torch.randint(9, (count, 4, 2))), list(names))


def test_stored_codes_take_the_place_of_pictures(chats):
    sample = chats.sample("story", 3)
    kept = stored([p.name for p in reversed(sample.pictures)])
    filled = kept.fill(sample)
    assert kinds(filled) == kinds(sample) and (filled.task, filled.name) == (sample.task, sample.name)
    for at, picture in enumerate(reversed(filled.pictures)):
        assert torch.equal(picture.codes.pixel, kept.codes.pixel[at : at + 1])
        assert torch.equal(picture.codes.semantic, kept.codes.semantic[at : at + 1])
    assert all(p.codes is None for p in sample.pictures)
    own = DualCodes(torch.ones(1, 4, 2), torch.ones(1, 4, 2))
    given = ChatSample((Message("user", (Picture("new", codes=own),)),), "caption", "0")
    assert kept.fill(given).pictures[0].codes is own  # what has codes keeps them


def test_codes_that_are_not_stored_are_one_line(chats):
    sample = chats.sample("edit", 0)
    with pytest.raises(UserError, match=rf"--data\.codes: no codes of picture {sample.pictures[0].name}"):
        stored(["another"]).fill(sample)
    with pytest.raises(UserError, match="2 pictures but 1 names"):
        StoredCodes(stored(["a", "b"]).codes, ["a"])


def test_a_pool_without_what_a_task_needs_is_a_mistake():
    alike = next(s for s in range(50) if all(len(scene(i, "train", s).objects) == 1 for i in range(3)))
    chats = SceneChats(SceneChatConfig(3, 1, seed=alike))
    with pytest.raises(UserError, match=r"--data.scenes: none of 3 scenes suits the task text_to_image; give more"):
        [chats.sample("text_to_image", i) for i in range(20)]
