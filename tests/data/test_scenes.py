from dataclasses import replace

import numpy as np
import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.data.scene_text import (
    EDIT_TYPES,
    QUESTION_TYPES,
    answer_of,
    captions,
    edits,
    in_order,
    position,
    questions,
    relation,
)
from dualtoken.data.scenes import COLORS, SHAPES, TEXTURES, Scene, SceneObject, Scenes, scene


def thing(**changes):
    start = SceneObject("square", "red", "plain", "large", 0.5, 0.5, 0.3, COLORS["red"])
    return replace(start, **changes)


def test_same_arguments_same_scene_and_splits_differ():
    assert scene(7) == scene(7)
    train, test = ({scene(i, split) for i in range(300)} for split in ("train", "test"))
    assert len(train) == len(test) == 300
    assert not train & test
    assert scene(7, seed=1) != scene(7)
    with pytest.raises(UserError, match="split 'val'"):
        scene(0, "val")


def test_every_factor_appears_and_objects_lie_inside():
    scenes = [scene(i) for i in range(600)]
    things = [thing for drawn in scenes for thing in drawn.objects]
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.color for t in things} == set(COLORS)
    assert {t.texture for t in things} == set(TEXTURES)
    assert {len(drawn.objects) for drawn in scenes} == {1, 2, 3, 4}
    assert all(t.radius <= t.x <= 1 - t.radius and t.radius <= t.y <= 1 - t.radius for t in things)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn_inside_their_radius_in_their_color(shape):
    picture = Scene("black", 0.0, (thing(shape=shape),)).render(96).astype(float) / 255
    red = picture[..., 0] > 0.5
    rows, columns = np.nonzero(red)
    assert 0.15 < red.sum() / (np.pi * (0.3 * 96) ** 2) < 1.2
    assert min(rows.min(), columns.min()) >= 96 * 0.19 - 1 and max(rows.max(), columns.max()) <= 96 * 0.81 + 1
    assert np.allclose(columns.mean(), 47.5, atol=1.5)
    assert np.allclose(np.median(picture[red], 0), COLORS["red"], atol=0.02)


def test_shapes_differ_from_each_other():
    masks = [Scene("black", 0.0, (thing(shape=s),)).render(48)[..., 0] > 100 for s in SHAPES]
    overlaps = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlaps) < 0.9


def test_resolutions_show_the_same_scene():
    small, large = scene(3).render(48), scene(3).render(192)
    pooled = large.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(pooled - small).mean() < 6


def test_position_and_relation_words():
    assert position(thing(x=0.2, y=0.2)) == "top left"
    assert position(thing()) == "center"
    assert relation(thing(x=0.2), thing(x=0.8)) == "left of"
    assert relation(thing(y=0.8), thing(y=0.2)) == "below"


def test_questions_are_answered_by_the_truth():
    seen = set()
    for i in range(200):
        drawn = scene(i)
        names = [t.name for t in drawn.objects]
        for asked in questions(drawn, np.random.default_rng(i)):
            seen.add(asked.type)
            words = asked.question.split()
            if asked.type == "exists":
                assert asked.answer == ("yes" if " ".join(words[3:5]) in names else "no")
            if asked.question.startswith("what color"):
                assert [t.color for t in drawn.objects if t.shape == words[4]] == [asked.answer]
            if asked.question.startswith("how many objects are there"):
                assert asked.answer == ("no", "one", "two", "three", "four")[len(names)]
            if asked.because:  # what is said to be seen is there, and comes before the answer
                assert asked.reply == f"{asked.because} : {asked.answer}" and answer_of(asked.reply) == asked.answer
                everything, *about = asked.because.split(" : ")
                for thing, listed in zip(in_order(drawn).objects, everything.split(" and "), strict=True):
                    assert listed.startswith("a ") and f" {thing.name}" in listed
                    if asked.type == "compare":
                        assert listed == f"a {thing.size} {thing.name}"
                    if asked.type == "position":
                        assert listed == f"a {thing.name} at the {position(thing)}"
                    if asked.question.startswith("what texture"):
                        assert listed == f"a {thing.texture} {thing.name}"
                if asked.type == "exists":
                    color, shape = words[3:5]
                    right = [f"a {t.name} {'yes' if t.color == color else 'no'}"
                             for t in in_order(drawn).objects if t.shape == shape]  # fmt: skip
                    assert about == [" and ".join(right) or "none"]
                if asked.type == "compare":  # "is the A larger than the B ?" -> the two with their sizes
                    pair = [" ".join(words[2:4]), " ".join(words[7:9])]
                    assert [" ".join(part.split()[2:]) for part in about[0].split(" and ")] == pair
                assert (len(about) == 1) == (asked.answer in ("yes", "no") or " are a " in asked.question)
            if asked.about:  # shorter: what is asked about, in the question's order, and what of it is asked
                assert asked.told == f"{asked.about} : {asked.answer}" and answer_of(asked.told) == asked.answer
                kind = "texture" if "texture" in words else asked.type
                says = {"compare": lambda t: f" {t.size}", "position": lambda t: f" at the {position(t)}"}
                says |= {"texture": lambda t: f" {t.texture}", "attribute": lambda t: ""}
                expected = {f"a {t.name}{says[kind](t)}": t for t in drawn.objects}
                meant = [expected[part] for part in asked.about.split(" and ")]
                if kind == "attribute":  # "what shape is the red object ?"
                    assert [words[4]] == [t.shape if words[1] == "color" else t.color for t in meant]
                else:
                    ends = [asked.question.index(t.name) for t in meant]
                    assert ends == sorted(ends) and len(ends) == asked.question.count("the ")
            else:
                assert asked.told == asked.reply
            if not asked.because:
                assert asked.reply == answer_of(asked.reply) == asked.answer
    assert seen == set(QUESTION_TYPES)


def test_edits_change_what_they_say_and_nothing_else():
    seen = set()
    for i in range(200):
        for edit in edits(scene(i), np.random.default_rng(i)):
            seen.add(edit.type)
            kept = set(edit.before.objects) & set(edit.after.objects)
            change = {"add": 1, "remove": -1}.get(edit.type, 0)
            assert len(edit.after.objects) == len(edit.before.objects) + change
            assert len(kept) == min(len(edit.before.objects), len(edit.after.objects)) - (change == 0)
            assert edit.before.background == edit.after.background
    assert seen == set(EDIT_TYPES)


def test_source_gives_pixels_captions_and_labels():
    source = Scenes(32, "test")
    sample = source[5]
    assert sample.image.shape == (3, 32, 32) and sample.image.dtype == torch.uint8
    assert torch.equal(sample.image, source[5].image) and sample.caption == source[5].caption
    assert sample.caption in captions(scene(5, "test"))
    single = next(i for i in range(50) if len(scene(i, "test").objects) == 1)
    assert source.classes[source[single].label] == scene(single, "test").objects[0].name
