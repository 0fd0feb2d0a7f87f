"""Packed batches of chats read in order from sharded sources, mixed by weight, with the exact place of reading.

What a reader (see `data/shards.py`) reads is a function of the seed, of its number and of how many there are. A batch
brings the place its reader has reached, and the state of a run is made of the places of the batches that were used, not
of those made ahead. With another number of readers the shards that were not read to the end are dealt again.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dualtoken.core.distributed import all_reduce_sum, is_distributed
from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample
from dualtoken.data.collate import ChatTokens, PackedBatch, pack
from dualtoken.data.images import outlive_sigterm
from dualtoken.data.mixture import Dropout
from dualtoken.data.shards import Deck, Place, SourceReader
from dualtoken.data.sources import ShardedSource

DRAW = 8  # which random numbers: of sources and dropout
REFUSED = 1000  # chats in a row that do not fit into a row, before it is a mistake


@dataclass
class Streamed:
    """A batch, and how far its reader has come with it."""

    batch: PackedBatch
    reader: int
    state: dict[str, Any]
    skipped: list[str]


class ReadBatches(IterableDataset):
    """The batches of this loading process, without end. A UserError is given in place of a batch."""

    def __init__(self, stream: "ChatStream"):
        self.stream = stream

    def __iter__(self) -> Iterator[Streamed | UserError]:
        stream, worker = self.stream, get_worker_info()
        # The loader asks its processes in turn from the first; that one goes on where the last run's turn was.
        number = ((worker.id if worker else 0) + stream.used) % stream.workers
        try:
            yield from self._read(stream, stream.rank * stream.workers + number)
        except UserError as error:
            yield error  # the loader would wrap it in a traceback

    def _read(self, stream: "ChatStream", reader: int) -> Iterator[Streamed]:
        state = stream.states[reader]
        draws = state["draws"]
        sources = [
            SourceReader(name, source, deck, reader, stream.window, Place(**place))
            for (name, source), deck, place in zip(stream.sources.items(), stream.decks, state["places"], strict=True)
        ]
        while True:
            samples: list[ChatTokens] = []
            refused = 0
            while len(samples) < stream.batch_size:
                rng = np.random.default_rng((stream.seed, reader, draws, DRAW))
                draws += 1
                source = sources[int(rng.choice(len(sources), p=stream.share))]
                tokens = self._tokens(stream, next(source), rng)
                if len(tokens.ids) > stream.most:
                    refused += 1
                    source.refuse(f"a chat of {len(tokens.ids)} tokens, {stream.bound}")
                    if refused == REFUSED:
                        long = f"{REFUSED} chats in a row are too long, the last has {len(tokens.ids)} tokens"
                        raise UserError(f"{long}: {stream.bound}")
                    continue
                samples.append(tokens)
                refused = 0
            batch = pack(samples, stream.length, stream.fill, stream.round_to)
            news = [line for source in sources for line in source.news]
            for source in sources:
                source.news = []
            yield Streamed(batch, reader, {"draws": draws, "places": [asdict(s.place) for s in sources]}, news)

    def _tokens(self, stream: "ChatStream", sample: ChatSample, rng: np.random.Generator) -> ChatTokens:
        hide_text, hide_semantic = stream.dropout.draw(rng, sample)
        tokens = stream.encode(sample, hide_text, pictures=False)
        tokens.pictures = sample.pictures
        tokens.draw_semantic = torch.full((len(tokens.pictures),), not hide_semantic)
        return tokens


class ChatStream:
    """Packed batches of one process, one after the other, from several sources.

    Args:
        sources, weights: by name; a source of weight 0 is not read.
        encode: a chat to ids without its pictures' codes (`DualTokenProcessor.encode`).
        batch_size, length, fill, round_to: see `pack`.
        window: chats that are shuffled together.
        workers: loading processes, 0 = none.
        longest: tokens that a chat may have, as the LLM's context; None = as many as a row.
    Raises UserError for sources that cannot be mixed.
    """

    def __init__(
        self,
        sources: dict[str, ShardedSource],
        weights: dict[str, float],
        encode: Callable[..., ChatTokens],
        batch_size: int,
        length: int,
        fill: int,
        seed: int,
        dropout: Dropout = Dropout(),
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        window: int = 64,
        round_to: int = 1,
        longest: int | None = None,
    ):
        for name, source in sources.items():
            if not source.shards:
                raise UserError(f"--data.sources {name}: no shards")
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"--data.sources: weights {weights}; give a weight above 0 to some of them")
        if window < 1:
            raise UserError(f"--data.window {window}: give at least 1, which shuffles nothing but shards")
        self.sources, self.encode, self.dropout = sources, encode, dropout
        self.share = np.array([weights[name] for name in sources]) / sum(weights.values())
        self.batch_size, self.length, self.fill, self.round_to = batch_size, length, fill, round_to
        self.most, self.bound = length, f"rows hold {length} (--data.length)"
        if longest is not None and longest < length:
            self.most, self.bound = longest, f"the language model takes {longest}"
        self.seed, self.rank, self.window = seed, rank, window
        self.processes, self.workers, self.loaded = world_size, max(1, workers), workers
        self.readers = self.processes * self.workers
        self.decks = [Deck((seed, i), len(source.shards), self.readers) for i, source in enumerate(sources.values())]
        self.used = 0  # batches taken
        self.states = [self._fresh(0) for _ in range(self.readers)]
        self.skipped: list[str] = []  # of the batches taken since someone asked
        self._batches: Iterator[Streamed | UserError] | None = None

    def _fresh(self, draws: int) -> dict[str, Any]:
        """State of a reader that has read nothing."""
        return {"draws": draws, "places": [asdict(Place()) for _ in self.sources]}

    def __iter__(self) -> "ChatStream":
        return self

    def __next__(self) -> PackedBatch:
        if self._batches is None:
            loader = DataLoader(
                ReadBatches(copy.copy(self)),  # itself would keep the loader's processes alive for longer than the run
                batch_size=None,
                num_workers=self.loaded,
                prefetch_factor=4 if self.loaded else None,
                worker_init_fn=outlive_sigterm,
                generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global random state
            )
            self._batches = iter(loader)
        found = next(self._batches)
        if isinstance(found, UserError):
            raise found
        self.states[found.reader] = found.state
        self.skipped += found.skipped
        self.used += 1
        return found.batch

    def counts(self, device: torch.device | str = "cpu") -> dict[str, int]:
        """Chats used of every source and things skipped, summed on a device over all processes; all must call it."""
        own = self.states[self.rank * self.workers :][: self.workers]
        places = [[state["places"][i] for state in own] for i in range(len(self.sources))]
        table = [[sum(p[what] for p in group) for what in ("given", "skipped")] for group in places]
        table = dict(zip(self.sources, all_reduce_sum(torch.tensor(table, device=device)).tolist(), strict=True))
        counted = {f"seen_{name}": given for name, (given, _) in table.items()}
        return counted | {f"skipped_{name}": bad for name, (_, bad) in table.items() if bad}

    def take_skipped(self) -> list[str]:
        """What was skipped in the batches taken since the last call, in words."""
        taken, self.skipped = self.skipped, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where all readers stand after the batches taken; to be called in all processes."""
        own = self.states[self.rank * self.workers :][: self.workers]
        every: list[Any] = [own]
        if is_distributed():
            every = [None] * self.processes
            torch.distributed.all_gather_object(every, own)
        return {
            "sources": {name: len(source.shards) for name, source in self.sources.items()},
            "processes": self.processes,
            "workers": self.workers,
            "used": self.used,
            "decks": [{"left": deck.left, "epoch": deck.epoch} for deck in self.decks],
            "readers": [state for part in every for state in part],
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a state: exactly with as many readers as there were, else with whole shards; then says so.

        Raises UserError where the sources have other shards.
        """
        for name, source in self.sources.items():
            before = state["sources"].get(name)
            if before != len(source.shards):
                raise UserError(
                    f"--data.sources {name}: {len(source.shards)} shards, the run began with {before}; give the same "
                    "shards, or another --output"
                )
        before = state["processes"] * state["workers"]
        for deck, dealt in zip(self.decks, state["decks"], strict=True):
            deck.readers, deck.epoch = before, dealt["epoch"]
            deck.left = [tuple(card) for card in dealt["left"]]
        if (state["processes"], state["workers"]) == (self.processes, self.workers):
            self.used, self.states = state["used"], state["readers"]
            return None
        places = [[reader["places"][i] for reader in state["readers"]] for i in range(len(self.sources))]
        self.states = [self._fresh(max(reader["draws"] for reader in state["readers"])) for _ in range(self.readers)]
        repeated = 0
        for i, group in enumerate(places):
            repeated += sum(p["start"] + p["taken"] > 0 for p in group)
            self.decks[i] = self.decks[i].dealt_again([p["turn"] for p in group], self.readers)
            for what in ("given", "skipped"):  # counts are sums over readers, so any of them may go on with it
                self.states[0]["places"][i][what] = sum(p[what] for p in group)
        return (
            f"chats: {before} readers ({state['processes']} processes) before, {self.readers} now: {repeated} shards "
            "that were read in part are read again from their start"
        )
