from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import dualtoken
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import Picture
from dualtoken.data.collate import IGNORE, ChatTokens, pack, spread
from dualtoken.data.images import step_batches
from dualtoken.data.mixture import Dropout, MixtureBatches
from dualtoken.data.scene_chat import SceneChatConfig, SceneChats
from dualtoken.mllm.processor import DualTokenProcessor
from tests import tiny
from tests.data.test_chat import stored

FILL = 9
ROOT = Path(dualtoken.__file__).parent


def tokens(size, first, pictures=0):
    """Ids first, first + 1, ...; everything but the second id is to be learnt."""
    ids = torch.arange(first, first + size)
    labels = ids.clone()
    labels[1:2] = IGNORE
    codes = torch.arange(pictures)[:, None, None] + first
    codes = DualCodes(codes, codes + 1) if pictures else None
    return ChatTokens(ids, labels, codes, torch.arange(pictures) % 2 == 0)


SAMPLES = [tokens(5, 100), tokens(9, 200, 2), tokens(3, 300, 1), tokens(6, 400, 3), tokens(2, 500)]


def pieces(batch):
    """Samples of each row as (ids, labels, positions), the padding at its end apart."""
    found, padding = [], []
    for row in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = [*(row[2] == 0).nonzero()[:, 0].tolist(), len(row[2])]
        for a, b in pairwise(starts):
            piece = [part[a:b] for part in row]
            (padding if (piece[0] == FILL).all() else found).append(piece)
    return found, padding


def test_samples_are_whole_apart_and_padded_at_the_end():
    batch = pack(SAMPLES, 10, FILL)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 9)
    found, padding = pieces(batch)
    wanted = sorted((s.ids.tolist() for s in SAMPLES), key=lambda ids: ids[0])
    assert sorted((ids.tolist() for ids, _, _ in found), key=lambda ids: ids[0]) == wanted
    for ids, labels, positions in found:
        sample = next(s for s in SAMPLES if s.ids[0] == ids[0])
        assert positions.tolist() == list(range(len(ids)))
        assert torch.equal(labels[1:], sample.labels[1:])
        assert labels[0] == IGNORE and sample.labels[0] != IGNORE  # nothing of its own predicts a first token
    for _, labels, positions in padding:
        assert (labels == IGNORE).all() and positions.tolist() == list(range(len(positions)))
    assert sum(len(p[0]) for p in padding) == 27 - 25
    assert batch.useful == pytest.approx(25 / 27) and batch.samples == 5


def test_codes_follow_their_samples():
    batch = pack(SAMPLES, 10, FILL)
    order = [ids[0].item() for ids, _, _ in pieces(batch)[0]]
    samples = [next(s for s in SAMPLES if s.ids[0] == first) for first in order]
    assert torch.equal(batch.codes.pixel, torch.cat([s.codes.pixel for s in samples if s.codes]))
    assert torch.equal(batch.codes.semantic, batch.codes.pixel + 1)
    assert torch.equal(batch.draw_semantic, torch.cat([s.draw_semantic for s in samples]))
    assert len(batch.codes) == 6 and set(batch.inputs) == {
        "input_ids", "position_ids", "labels", "codes", "draw_semantic"
    }  # fmt: skip
    assert pack([tokens(4, 1)], 10, FILL).codes is None


def test_rows_are_few_and_full_rows_have_no_padding():
    many = [tokens(size, 100 * i) for i, size in enumerate([6, 4, 7, 3, 5, 5, 10])]
    batch = pack(many, 10, FILL)
    assert batch.input_ids.shape == (4, 10) and batch.useful == 1.0 and not pieces(batch)[1]
    assert pack(many[:1], 6, FILL).useful == 1.0


def test_rows_are_equally_full_and_as_wide_as_the_fullest():
    samples = [tokens(size, 100 * (i + 1)) for i, size in enumerate([7, 5, 4, 4, 3, 3, 2, 2])]
    for length, shape in ((10, (3, 10)), (16, (2, 15))):
        batch = pack(samples, length, FILL)
        assert batch.input_ids.shape == shape and batch.useful == 1.0
    # longest first gives 8 + 5 + 4 and 7 + 6; exchanges make both 15
    assert pack([tokens(size, 100) for size in (8, 7, 6, 5, 4)], 20, FILL).input_ids.shape == (2, 15)
    for seed in range(20):
        sizes = torch.randint(1, 30, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = spread(sizes, 40)
        assert sorted(i for row in rows for i in row) == list(range(16)) and all(rows)
        assert max(sum(sizes[i] for i in row) for row in rows) <= 40


@pytest.mark.parametrize(("round_to", "width"), [(1, 9), (4, 12), (8, 13), (100, 13)])
def test_widths_can_be_multiples_and_never_more_than_the_length(round_to, width):
    batch = pack([tokens(9, 100)], 13, FILL, round_to)
    assert batch.input_ids.shape == (1, width) and batch.useful == pytest.approx(9 / width)


def picture(name, *, coded=False, edited=None):
    place = int(name)
    codes = DualCodes(torch.full((1, 4, 2), place), torch.full((1, 4, 2), -place)) if coded else None
    pixels = None if coded else torch.full((3, 8, 8), place, dtype=torch.uint8)
    return Picture(name, image=pixels, codes=codes, edited=edited)


def test_pictures_without_codes_come_as_pixels_and_know_their_place():
    first, second = picture("1"), picture("2", coded=True)
    chats = [
        [picture("3", edited=picture("9"))],  # what it was made of is not in the batch
        [first, picture("4", edited=first), second, picture("5", edited=picture("4"))],
    ]
    samples = [
        ChatTokens(torch.arange(size), torch.arange(size), None, torch.ones(len(shown), dtype=torch.bool), shown)
        for size, shown in zip((3, 5), chats, strict=True)
    ]
    batch = pack(samples, 8, FILL)  # one row, the longer sample first
    assert batch.unseen.images[:, 0, 0, 0].tolist() == [1, 4, 5, 3] and batch.unseen.images.shape == (4, 3, 8, 8)
    assert batch.unseen.places.tolist() == [0, 1, 3, 4] and batch.unseen.before.tolist() == [-1, 0, 1, -1]
    assert batch.codes.pixel.flatten().unique().tolist() == [2] and len(batch.draw_semantic) == 5
    assert batch.to("cpu").unseen is batch.unseen
    samples[0].pictures = [Picture("empty")]
    with pytest.raises(UserError, match="picture empty has neither pixels nor codes"):
        pack(samples, 8, FILL)


def test_a_sample_longer_than_a_row_is_one_line():
    with pytest.raises(UserError, match=r"a sample has 9 tokens, rows hold 8: raise --data\.length to at least 9"):
        pack(SAMPLES, 8, FILL)
    assert pack(SAMPLES, 9, FILL).samples == 5


def test_moving_a_batch_keeps_all_of_it():
    batch = pack(SAMPLES, 10, FILL)
    moved = batch.to("meta")
    assert moved.codes.pixel.device.type == moved.labels.device.type == "meta"
    assert (moved.useful, moved.samples) == (batch.useful, batch.samples)


# -- which chats make up a step --

SOURCE = SceneChats(SceneChatConfig(scenes=20, stories=10))


def mixture(weights, encode=None, **options):
    given = {"batch_size": 4, "length": 256, "fill": FILL, "seed": 3} | options
    if encode is None:
        encode = tiny.mllm()[1].encode
        pool = SOURCE.pictures()
        given["stored"] = stored([pool[i].name for i in range(len(pool))])
    return MixtureBatches(SOURCE, weights, encode, **given)


def test_a_chat_longer_than_the_context_of_the_language_model_is_one_line():
    with pytest.raises(UserError, match=r"of the task story has \d+ tokens, the language model takes 20"):
        mixture({"story": 1.0}, longest=20)[0]
    assert mixture({"story": 1.0}, longest=256)[0].samples == 4


def test_the_miniatures_mixture_wastes_less_than_a_twentieth():
    recipe = yaml.safe_load((ROOT / "recipes/mini-mllm.yaml").read_text())
    stage, data = recipe["recipe"]["4-1"], recipe["data"]
    processor = DualTokenProcessor.from_pretrained(ROOT / "checkpoints/mini/mllm")
    batches = MixtureBatches(
        SceneChats(SceneChatConfig(**data["scenes"])),
        stage["mixture"],
        lambda sample, hide_text: processor.encode(sample, hide_text, pictures=False),
        stage["batch_size"],
        data["length"],
        processor.tokenizer.pad_token_id,
        seed=3,
        dropout=Dropout(data["dropout"]["text"], 0.0),
    )
    useful = [batches[step].useful for step in range(20)]
    assert sum(useful) / len(useful) > 0.95


class Seen:
    """In place of a processor: notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, hide_text):
        self.calls.append((sample, hide_text))
        return ChatTokens(torch.arange(3), torch.arange(3), None, torch.ones(len(sample.pictures), dtype=torch.bool))


def seen(weights, steps=75, **options):
    encode = Seen()
    batches = mixture(weights, encode, **options)
    made = [batches[step] for step in range(steps)]
    return encode.calls, made


def equal(one, other):
    same = all(torch.equal(getattr(one, n), getattr(other, n))
               for n in ("input_ids", "labels", "position_ids", "draw_semantic"))  # fmt: skip
    return same and torch.equal(one.codes.pixel, other.codes.pixel)


ALL = {"caption": 1, "text_to_image": 1, "edit": 1, "story": 1}


def test_a_batch_is_a_function_of_seed_step_and_rank():
    dropout = Dropout(0.5, 0.5)
    batches = mixture(ALL, dropout=dropout)
    wanted = [batches[step] for step in range(4)]
    for workers in (0, 2):
        found = list(step_batches(mixture(ALL, dropout=dropout), 1, 4, workers))
        assert len(found) == 3 and all(equal(a, b) for a, b in zip(found, wanted[1:], strict=True))
    assert not equal(wanted[0], wanted[1])
    assert not equal(mixture(ALL, seed=4, dropout=dropout)[0], wanted[0])
    assert not equal(mixture(ALL, rank=1, world_size=2, dropout=dropout)[0], wanted[0])


def test_processes_share_a_step_without_overlap():
    names = []
    for rank in range(2):
        encode = Seen()
        batches = mixture(ALL, encode, rank=rank, world_size=2, batch_size=2)
        for step in range(3):
            batches[step]
        names.append([sample.name for sample, _ in encode.calls])
    one = [sample.name for sample, _ in seen(ALL, steps=3)[0]]
    assert len(set(one)) == 12
    both = [name for step in range(3) for rank in range(2) for name in names[rank][2 * step : 2 * step + 2]]
    assert both == one


def test_tasks_come_by_their_weights():
    counts = Counter(sample.task for sample, _ in seen({"caption": 3, "vqa": 1, "text": 0}, steps=100)[0])
    assert set(counts) == {"caption", "vqa"} and sum(counts.values()) == 400
    assert counts["caption"] / 400 == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_text_is_hidden_in_that_share_of_the_samples_that_draw(share):
    calls, _ = seen(ALL | {"vqa": 1}, steps=100, dropout=Dropout(text=share))
    assert not any(hidden for sample, hidden in calls if not sample.draws)
    drawing = [hidden for sample, hidden in calls if sample.draws]
    assert len(drawing) > 150 and sum(drawing) / len(drawing) == pytest.approx(share, abs=0.08 * (0 < share < 1))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_semantic_codes_are_hidden_in_that_share_of_the_samples_that_draw(share):
    for task, draws in (("text_to_image", True), ("caption", False)):
        calls, batches = seen({task: 1}, steps=50, dropout=Dropout(text=0.0, semantic=share))
        known = torch.cat([batch.draw_semantic for batch in batches]).float().mean().item()
        wanted = 1 - share if draws else 1.0
        assert len(calls) == 200 and known == pytest.approx(wanted, abs=0.08 if draws and 0 < share < 1 else 0)


@pytest.mark.parametrize("weights", [{}, {"poem": 1}, {"caption": 0}, {"caption": 2, "vqa": -1}])
def test_mixtures_that_cannot_be_are_one_line(weights):
    with pytest.raises(UserError, match="give a weight above 0 to some of the tasks caption, vqa"):
        mixture(weights, Seen())
