"""Which chats make up a step: tasks drawn by weight, packed; step `i` is a function of (seed, i, rank) alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, StoredCodes
from dualtoken.data.collate import ChatTokens, PackedBatch, pack


class ChatSource(Protocol):
    """Chats by task and number."""

    tasks: tuple[str, ...]

    def sample(self, task: str, index: int) -> ChatSample: ...


@dataclass
class Dropout:
    """What is hidden in training: `text` of a share of the samples that draw, for classifier-free guidance;
    `semantic` codes of a share of them, so that the model also learns to draw without."""

    text: float = 0.1
    semantic: float = 0.0

    def draw(self, rng: np.random.Generator, sample: ChatSample) -> tuple[bool, bool]:
        """Whether a sample's text, and the semantic codes of what it draws, are hidden."""
        text, semantic = rng.random(2) < (self.text, self.semantic)
        return bool(text) and sample.draws, bool(semantic) and sample.draws


class MixtureBatches(Dataset):
    """Batch number `step` of one process, packed into rows.

    Args:
        weights: task -> weight; tasks that the source lacks raise UserError.
        encode: a chat, and whether its text is hidden, to ids.
        fill: id of padding; length, round_to: of a row (see `pack`).
        longest: tokens that a chat may have, as the LLM's context; None = as many as a row.
    """

    def __init__(
        self,
        source: ChatSource,
        weights: dict[str, float],
        encode: Callable[[ChatSample, bool], ChatTokens],
        batch_size: int,
        length: int,
        fill: int,
        seed: int,
        stored: StoredCodes | None = None,
        dropout: Dropout = Dropout(),
        rank: int = 0,
        world_size: int = 1,
        round_to: int = 1,
        longest: int | None = None,
    ):
        unknown = [task for task in weights if task not in source.tasks]
        if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"mixture {weights}: give a weight above 0 to some of the tasks {', '.join(source.tasks)}")
        self.source, self.encode, self.stored, self.dropout = source, encode, stored, dropout
        self.tasks = list(weights)
        self.share = np.array([weights[t] for t in self.tasks]) / sum(weights.values())
        self.batch_size, self.length, self.fill, self.seed = batch_size, length, fill, seed
        self.rank, self.world_size, self.round_to = rank, world_size, round_to
        self.longest = longest or length

    def __getitem__(self, step: int) -> PackedBatch:
        start = (step * self.world_size + self.rank) * self.batch_size
        samples = [self._tokens(place) for place in range(start, start + self.batch_size)]
        return pack(samples, self.length, self.fill, self.round_to)

    def _tokens(self, place: int) -> ChatTokens:
        rng = np.random.default_rng((self.seed, place, 4))
        task = self.tasks[int(rng.choice(len(self.tasks), p=self.share))]
        sample = self.source.sample(task, self.seed * 2**40 + place)
        if self.stored is not None:
            sample = self.stored.fill(sample)
        hide_text, hide_semantic = self.dropout.draw(rng, sample)
        tokens = self.encode(sample, hide_text)
        if self.longest < len(tokens.ids) <= self.length:
            raise UserError(
                f"a chat of the task {task} has {len(tokens.ids)} tokens, the language model takes {self.longest}"
            )
        if hide_semantic:
            tokens.draw_semantic = torch.zeros_like(tokens.draw_semantic)
        return tokens
