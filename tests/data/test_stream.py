import os
import time
from collections import Counter
from itertools import islice

import pytest
import torch
import torch.multiprocessing as mp

from dualtoken.core.checkpoint import load_state, save_state
from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.collate import ChatTokens
from dualtoken.data.mixture import Dropout
from dualtoken.data.shards import Deck, Place, SourceReader
from dualtoken.data.sources import Skipped
from dualtoken.data.stream import ChatStream

LIMIT = 120  # seconds for what must not hang


class Listed:
    """Shards of given sizes. Chat k of shard s says the number 10000 * base + 100 * s + k, `bad` ones are skipped."""

    def __init__(self, *sizes, base=1, bad=(), long=(), picture=False):
        self.sizes, self.base, self.bad, self.long, self.picture = sizes, base, bad, long, picture
        self.shards = [f"shard {s}" for s in range(len(sizes))]
        self.reads = Counter()

    def read(self, shard):
        s = self.shards.index(shard)
        self.reads[s] += 1
        for k in range(self.sizes[s]):
            number = 10000 * self.base + 100 * s + k
            if number in self.bad:
                yield Skipped(f"chat {number} is damaged")
                continue
            said = (str(number),) + (("long",) if number in self.long else ())
            drawn = (Picture(str(number), image=torch.full((3, 4, 4), number % 256, dtype=torch.uint8)),)
            yield ChatSample((Message("user", said), Message("assistant", drawn if self.picture else ("",))), "x", "x")

    def numbers(self, *shards):
        kept = shards or range(len(self.sizes))
        every = [10000 * self.base + 100 * s + k for s in kept for k in range(self.sizes[s])]
        return [number for number in every if number not in self.bad]


def encode(sample, hide_text, pictures):
    assert not pictures
    said = sample.messages[0].content
    ids = torch.tensor([int(said[0]), *[5] * (20 if "long" in said else 2)])
    return ChatTokens(ids, ids.clone(), None, torch.ones(0, dtype=torch.bool))


def stream(sources, weights=None, **options):
    given = {"batch_size": 2, "length": 16, "fill": 0, "seed": 3, "window": 4} | options
    sources = sources if isinstance(sources, dict) else {"a": sources}
    return ChatStream(sources, weights or dict.fromkeys(sources, 1.0), encode, **given)


def said(*batches):
    """Numbers of the chats of some batches."""
    return [n for batch in batches for n in batch.input_ids.flatten().tolist() if n >= 10000]


def take(streamed, count):
    return said(*islice(streamed, count))


# -- the order of one source --


@pytest.mark.parametrize(("shards", "readers"), [(1, 1), (5, 1), (5, 2), (5, 5), (2, 5), (1, 8)])
def test_an_epoch_is_dealt_whole(shards, readers):
    deck = Deck((3, 0), shards, readers)
    assert deck.cards == shards * deck.parts >= readers
    rounds = -(-2 * deck.cards // readers)
    dealt = [deck.card(reader, turn) for turn in range(rounds) for reader in range(readers)][: 2 * deck.cards]
    for epoch in range(2):
        part = dealt[epoch * deck.cards : (epoch + 1) * deck.cards]
        assert sorted(part) == [(epoch, s, p) for s in range(shards) for p in range(deck.parts)]
    if shards == 5:
        orders = [[s for _, s, _ in dealt[epoch * deck.cards : (epoch + 1) * deck.cards]] for epoch in range(2)]
        assert orders[0] != orders[1]
        assert [Deck((4, 0), shards, readers).card(r, 0) for r in range(readers)] != dealt[:readers] or readers == 1


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_readers_read_every_chat_of_an_epoch_once(readers):
    source = Listed(9, 0, 4, 1, bad=(10003, 10201))
    found = []
    for reader in range(readers):
        deck = Deck((3, 0), 4, readers)
        one = SourceReader("a", source, deck, reader, 3, Place())
        while deck.card(reader, one.place.turn)[0] == 0:
            found.append(int(next(one).messages[0].content[0]))
            if deck.card(reader, one.place.turn)[0] > 0:
                found.pop()  # the first of the next epoch
    assert sorted(found) == source.numbers()


def test_windows_shuffle_and_shards_come_in_another_order():
    source = Listed(*[8] * 6)
    numbers = take(stream(source, window=8), 24)
    assert sorted(numbers) == source.numbers()
    shards = [n // 100 % 100 for n in numbers[::8]]
    assert sorted(shards) == list(range(6)) and shards != sorted(shards)
    for begin in range(0, 48, 8):
        assert len({n // 100 for n in numbers[begin : begin + 8]}) == 1
        assert numbers[begin : begin + 8] != sorted(numbers[begin : begin + 8])
    in_order = take(stream(source, window=1), 24)
    assert all(in_order[b : b + 8] == sorted(in_order[b : b + 8]) for b in range(0, 48, 8))
    assert numbers == take(stream(source, window=8), 24) != take(stream(source, window=8, seed=4), 24)


def test_what_cannot_be_used_is_counted_and_named():
    source = Listed(6, 6, bad=(10002, 10103), long=(10004,))
    one = stream(source, window=1)
    numbers = take(one, 10)
    assert sorted(numbers[:18]) == sorted(2 * [n for n in source.numbers() if n != 10004])  # two epochs of nine chats
    told = one.take_skipped()
    assert one.counts() == {"seen_a": 20, "skipped_a": len(told)}
    assert set(told) == {
        "chat 10002 is damaged",
        "chat 10103 is damaged",
        "a: a chat of 21 tokens, rows hold 16 (--data.length)",
    }
    assert min(Counter(told).values()) == 2 and one.take_skipped() == []


def test_a_chat_longer_than_the_context_of_the_language_model_is_refused_though_a_row_would_hold_it():
    one = stream(Listed(6, 6, long=(10004,)), window=1, length=64, longest=16)
    take(one, 10)
    assert set(one.take_skipped()) == {"a: a chat of 21 tokens, the language model takes 16"}


@pytest.mark.parametrize("workers", [0, 1])
def test_sources_without_a_chat_are_one_line(workers):
    with pytest.raises(UserError, match=r"--data.sources a: no chat in its 2 shards, the first: chat 1") as at:
        next(stream(Listed(1, 0, bad=(10000,)), workers=workers))
    assert "\n" not in str(at.value)
    with pytest.raises(
        UserError, match=r"1000 chats in a row are too long, .* 21 tokens: rows hold 16 \(--data.length\)"
    ):
        next(stream(Listed(2, long=(10000, 10001)), workers=workers))


@pytest.mark.parametrize(
    ("sources", "weights", "options", "words"),
    [
        (Listed(), None, {}, "a: no shards"),
        (Listed(2), {"a": 0.0}, {}, "give a weight above 0"),
        ({"a": Listed(2), "b": Listed(2)}, {"a": 1.0, "b": -1.0}, {}, "give a weight above 0"),
        (Listed(2), None, {"window": 0}, "--data.window 0"),
    ],
)
def test_mixtures_that_cannot_be_are_one_line(sources, weights, options, words):
    with pytest.raises(UserError, match=words):
        stream(sources, weights, **options)


# -- the mixture --


def test_sources_come_by_their_weights_and_are_counted():
    sources = {"a": Listed(30, 30), "b": Listed(7, 0, 9, base=2), "c": Listed(5, base=3)}
    one = stream(sources, {"a": 3.0, "b": 1.0, "c": 0.0}, batch_size=8, length=64)
    numbers = take(one, 50)
    seen = Counter(n // 10000 for n in numbers)
    assert seen[1] / 400 == pytest.approx(0.75, abs=0.06) and seen[1] + seen[2] == 400
    assert one.counts() == {"seen_a": seen[1], "seen_b": seen[2], "seen_c": 0}
    assert not sources["c"].reads


def test_words_and_semantic_codes_are_hidden_in_what_is_drawn():
    asked = []

    def noting(sample, hide_text, pictures):
        asked.append(hide_text)
        return encode(sample, hide_text, pictures)

    for share, picture in ((1.0, True), (0.0, True), (1.0, False)):
        asked.clear()
        source = {"a": Listed(9, picture=picture)}
        one = ChatStream(source, {"a": 1.0}, noting, 2, 16, 0, 3, Dropout(share, share))
        batch = next(one)
        hidden = bool(share) and picture
        assert asked == [hidden] * 2 and batch.draw_semantic.tolist() == [not hidden] * (2 * picture)
        assert (batch.unseen is not None) == picture
        if picture:  # pixels stay with their chats
            assert batch.unseen.images[:, 0, 0, 0].tolist() == [n % 256 for n in said(batch)]
            assert batch.unseen.places.tolist() == [0, 1] and batch.codes is None


# -- going on --


def stored(state, folder):
    """The state as it comes back from disk."""
    return load_state(save_state(folder, 1, {"data": state}))["data"]


MIXED = {"a": (9, 0, 14, 3), "b": (5,)}


def mixed(**options):
    sources = {"a": Listed(*MIXED["a"], bad=(10002,), long=(10203,)), "b": Listed(*MIXED["b"], base=2)}
    return stream(sources, {"a": 2.0, "b": 1.0}, **options)


@pytest.mark.parametrize(("workers", "places"), [(0, (0, 1, 2, 5, 9, 20)), (2, (1, 5)), (3, (4,))])
def test_a_run_goes_on_with_the_batches_that_would_have_come(workers, places, tmp_path):
    whole = mixed(workers=workers)
    wanted = list(islice(whole, 30))
    for place in places:
        first = mixed(workers=workers)
        take(first, place)
        second = mixed(workers=workers)
        assert second.load_state_dict(stored(first.state_dict(), tmp_path / str(place))) is None
        rest = list(islice(second, 30 - place))
        for one, other in zip(rest, wanted[place:], strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.position_ids, other.position_ids)
        assert second.counts() == whole.counts() and second.state_dict() == whole.state_dict()


def many(source, readers):
    """Streams of as many processes, in this one."""
    return [stream(source, rank=rank, world_size=readers) for rank in range(readers)]


SHARDS = [(9, 8, 0, 14, 3, 7, 6, 8, 2, 9), (11, 6), (30,)]


@pytest.mark.parametrize("sizes", SHARDS)
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (4, 1), (2, 9)])
@pytest.mark.parametrize("batches", [3, 8, 31])
def test_with_other_readers_no_chat_is_lost_and_a_shard_a_reader_is_read_again(sizes, before, after, batches, tmp_path):
    source = Listed(*sizes)
    first = many(source, before)
    used = Counter(said(*(batch for one in first for batch in islice(one, batches))))
    state = first[0].state_dict() | {"readers": [r for one in first for r in one.state_dict()["readers"]]}
    second = many(source, after)
    lines = [one.load_state_dict(stored(state, tmp_path)) for one in second]
    assert f"chats: {before} readers" in lines[0] and f"{after} now" in lines[0] and len(set(lines)) == 1
    assert sum(one.counts()["seen_a"] for one in second) == used.total()
    deck = second[0].decks[0]
    again = Counter()
    for _, shard, part in deck.left:
        again.update(source.numbers(shard)[part :: deck.parts])
    both = used + again
    assert set(both) == set(source.numbers())
    # every epoch that was begun is now whole; what is there once more is of a shard that was read in part
    times = Counter(dict.fromkeys(source.numbers(), deck.epoch))
    assert not times - both
    twice = {n // 100 for n in both - times}
    assert len(twice) <= max(before, after)
    if deck.left:
        _, shard, part = deck.left[0]
        own = source.numbers(shard)[part :: deck.parts]
        assert take(second[0], 1)[0] in own or not own


def test_other_shards_or_sources_than_before_are_one_line():
    state = stream(Listed(2, 3)).state_dict()
    with pytest.raises(UserError, match=r"a: 3 shards, the run began with 2; give the same shards"):
        stream(Listed(2, 3, 1)).load_state_dict(state)


# -- several processes --


def _read(rank, folder, results):
    """One of two processes that reads, sums and saves in step with the other."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for sizes, workers in (((20, 0, 1), 0), ((3,), 0), ((1, 25), 2)):
        one = stream(Listed(*sizes), rank=rank, world_size=2, workers=workers)
        numbers = []
        for _ in range(15):
            numbers += take(one, 1)
            torch.distributed.all_reduce(torch.ones(1))
        state = one.state_dict()
        again = stream(Listed(*sizes), rank=rank, world_size=2, workers=workers)
        again.load_state_dict(state)
        found.append((numbers, one.counts(), take(one, 4) == take(again, 4), len(state["readers"])))
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_few_empty_and_unequal_shards_stop_no_process(tmp_path):
    context = mp.get_context("fork")
    results = context.Queue()
    started = [context.Process(target=_read, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        found = dict(results.get(timeout=LIMIT) for _ in range(2))
        deadline = time.time() + LIMIT
        for process in started:
            process.join(max(0, deadline - time.time()))
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            if process.is_alive():
                os.kill(process.pid, 9)
    for sizes, readers, one, other in zip(((20, 0, 1), (3,), (1, 25)), (2, 2, 4), found[0], found[1], strict=True):
        assert one[1] == other[1] == {"seen_a": 60} and one[2] and other[2] and one[3] == other[3] == readers
        assert len(one[0]) == len(other[0]) == 30
        assert set(one[0]) | set(other[0]) == set(Listed(*sizes).numbers())
