"""Which shards of a source a reader reads, and where it stands in them.

Every loading process of every training process is a reader. The shards of a source are dealt to the readers like cards,
in another order each epoch; a source with fewer shards than readers has its shards cut into parts. No reader waits for
another, so empty and unequal shards stop nothing.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample
from dualtoken.data.sources import ShardedSource, Skipped

ORDER, WINDOW = 6, 7  # which random numbers: of shards, of chats in a window


@dataclass
class Deck:
    """The endless order of one source's shards: what other readers have left, then epoch after epoch.

    Part p of the P parts of a shard has its chats p, p + P, ...

    Args:
        key: seed, and number of the source; shards: how many; readers: how many.
        left: (epoch, shard, part) to be read first; epoch: the first whole one.
    """

    key: tuple[int, int]
    shards: int
    readers: int
    left: list[tuple[int, int, int]] = field(default_factory=list)
    epoch: int = 0

    @property
    def parts(self) -> int:
        """P, so many that every reader has something of its own."""
        return -(-self.readers // self.shards)

    @property
    def cards(self) -> int:
        """Parts of shards in an epoch."""
        return self.shards * self.parts

    def card(self, reader: int, turn: int) -> tuple[int, int, int]:
        """Epoch, shard and part that a reader reads at its turn, counted from 0."""
        place = reader + turn * self.readers
        if place < len(self.left):
            return tuple(self.left[place])
        epochs, place = divmod(place - len(self.left), self.cards)
        order = _order(self.key, self.epoch + epochs, self.cards)
        return self.epoch + epochs, *divmod(int(order[place]), self.parts)

    def dealt_again(self, turns: list[int], readers: int) -> "Deck":
        """For another number of readers: shards that have not been read to the end, given the turn of each reader."""
        reached = [reader + turn * self.readers for reader, turn in enumerate(turns)]
        begun = -(-max(0, max(reached) + 1 - len(self.left)) // self.cards)  # epochs that someone has reached
        end = len(self.left) + begun * self.cards
        open_places = sorted(place for first in reached for place in range(first, end, self.readers))
        open_shards = dict.fromkeys(self.card(place % self.readers, place // self.readers)[:2] for place in open_places)
        deck = Deck(self.key, self.shards, readers, [], self.epoch + begun)
        deck.left = [(*shard, part) for shard in open_shards for part in range(deck.parts)]
        return deck


@lru_cache(maxsize=4)
def _order(key: tuple[int, int], epoch: int, cards: int) -> np.ndarray:
    return np.random.default_rng((*key, epoch, ORDER)).permutation(cards)


@dataclass
class Place:
    """Where a reader stands in one source.

    Args:
        turn: of its shards; start: things of that shard before the window; taken: chats of the window.
        given: chats in all; skipped: things that could not be used, but for those of the window.
    """

    turn: int = 0
    start: int = 0
    taken: int = 0
    given: int = 0
    skipped: int = 0


class SourceReader:
    """One reader's chats of one source, without end, shuffled within windows.

    A window lies in one shard, so reading goes on exactly where it was after reading no more than that shard again.
    """

    def __init__(self, name: str, source: ShardedSource, deck: Deck, reader: int, window: int, place: Place):
        self.name, self.source, self.deck, self.reader, self.window = name, source, deck, reader, window
        self.place = place
        self.news: list[str] = []  # what has been skipped since someone asked
        self._items: Iterator[ChatSample | Skipped] | None = None
        self._chats: list[ChatSample] = []
        self._read = self._bad = self._barren = 0  # things of the window, bad ones; shards in a row without a chat

    def __next__(self) -> ChatSample:
        place = self.place
        if self._items is None:
            self._open()
        while place.taken >= len(self._chats):
            place.start, place.taken, place.skipped = place.start + self._read, 0, place.skipped + self._bad
            if self._read < self.window:  # the shard is at its end
                self._barren += 1
                if self._barren > self.deck.cards:
                    self._look_for_any()
                place.turn, place.start = place.turn + 1, 0
                self._open()
            else:
                self._fill()
        place.taken, place.given = place.taken + 1, place.given + 1
        return self._chats[place.taken - 1]

    def refuse(self, why: str) -> None:
        """The chat given last cannot be used."""
        self.place.given, self.place.skipped = self.place.given - 1, self.place.skipped + 1
        self.news.append(f"{self.name}: {why}")

    def _open(self) -> None:
        """Read the window at `place.start` of this turn's shard."""
        self._card = self.deck.card(self.reader, self.place.turn)
        _, shard, part = self._card
        things, parts = self.source.read(self.source.shards[shard]), self.deck.parts
        self._items = itertools.islice(things, part + self.place.start * parts, None, parts)
        self._fill()

    def _fill(self) -> None:
        things = list(itertools.islice(self._items, self.window))
        chats = [thing for thing in things if isinstance(thing, ChatSample)]
        bad = [thing.what for thing in things if not isinstance(thing, ChatSample)]
        order = np.random.default_rng((*self.deck.key, *self._card, self.place.start, WINDOW)).permutation(len(chats))
        self._chats = [chats[i] for i in order]
        self._read, self._bad = len(things), len(bad)
        self._barren = 0 if chats else self._barren
        self.news += bad

    def _look_for_any(self) -> None:
        """Raise UserError where no shard has a chat; this reader may only have met the empty ones."""
        for shard in self.source.shards:
            if any(isinstance(thing, ChatSample) for thing in self.source.read(shard)):
                self._barren = 0
                return
        first = f", the first: {self.news[0]}" if self.news else ""
        raise UserError(f"--data.sources {self.name}: no chat in its {len(self.source.shards)} shards{first}")
