"""What each row of a batch of replies has of its own: randomness, limit, stop texts, and someone who reads along.

transformers' `generate` knows one setting for all rows. Here a logits processor samples each row with the generator of
its own seed (Gumbel noise, so that the likeliest token is a sample), and a stopping criterion ends rows one by one.
A row is therefore the same alone or in any batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

UNFINISHED = "\ufffd"  # a character of which not all bytes are there yet


@dataclass
class TextConfig:
    """How one reply is written.

    Args:
        max_tokens: longest reply.
        temperature: 0 = the likeliest token; top_p: share of the likeliest tokens that are kept.
        seed: of its randomness.
        stop: texts that end the reply and are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class TextRow:
    """One reply while it is written, in one stretch of words or several with pictures between them.

    Args: listen: told the text so far, whenever there is more; left: whether nobody waits for the reply any more.
    """

    def __init__(
        self,
        config: TextConfig,
        listen: Callable[[str], None] | None = None,
        left: Callable[[], bool] = lambda: False,
    ):
        self.config, self.listen, self.left = config, listen, left
        self.generator = torch.Generator().manual_seed(config.seed)
        self.stretches: list[list[int]] = []
        self.count = 0  # tokens, without those that end a stretch
        self.finish = "length"  # until it ends by itself: then "stop", as OpenAI calls it
        self.closed = False

    def push(self, token: int, first: bool, ends: set[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Take the next token; True where the reply, or this stretch of it, is over."""
        if first:
            self.stretches.append([])
            self.finish = "length"
        elif self.closed or self.finish == "stop":
            return True  # other rows are still being written
        self.stretches[-1].append(token)
        if token in ends:
            self.finish = "stop"
        else:
            self.count += 1
            self.closed = self.count >= self.config.max_tokens
        if self.config.stop or self.listen is not None:
            text = self.text(tokenizer)
            if any(stop in text for stop in self.config.stop):
                self.finish, self.closed = "stop", True
            if self.listen is not None:
                self.listen(self._safe(text))
        self.closed |= self.left()
        return self.closed or self.finish == "stop"

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What was said so far, stretches set apart by an empty line."""
        said = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in self.stretches)
        return "\n\n".join(text for text in said if text)

    def end(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole text, up to the first stop text."""
        text = self.text(tokenizer)
        places = [text.find(stop) for stop in self.config.stop if stop in text]
        return text[: min(places)].rstrip() if places else text

    def _safe(self, text: str) -> str:
        """The part of the text that no later token can take back: no half character, no beginning of a stop text."""
        text = text.rstrip(UNFINISHED)
        starts = [text.find(stop) for stop in self.config.stop if stop in text]
        for stop in self.config.stop:
            starts += [len(text) - n for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: min(starts)].rstrip() if starts else text


class OwnRandomness(LogitsProcessor):
    """Scores [B, V] so that the likeliest token of each row is a sample by the row's own temperature and seed."""

    def __init__(self, rows: Sequence[TextRow]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([self._sample(row, one) for row, one in zip(self.rows, scores, strict=True)])

    def _sample(self, row: TextRow, scores: Tensor) -> Tensor:
        config = row.config
        if config.temperature == 0:
            return scores
        scaled = scores.float() / config.temperature
        if config.top_p < 1:
            values, tokens = scaled.sort(descending=True)
            likely = values.softmax(-1)
            values = values.masked_fill(likely.cumsum(-1) - likely >= config.top_p, -torch.inf)
            scaled = torch.empty_like(values).scatter(-1, tokens, values)
        uniform = torch.rand(scaled.shape, generator=row.generator).clamp(1e-20).to(scaled.device)
        return scaled - torch.log(-torch.log(uniform))


class FollowRows(StoppingCriteria):
    """Hands each row its newest token and ends those rows that say so; ids [B, t] are of the reply alone.

    Args: ends: ids that end a reply, and the one that asks for a picture.
    """

    def __init__(self, rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase, ends: set[int]):
        self.rows, self.tokenizer, self.ends = rows, tokenizer, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        first = input_ids.shape[1] == 1
        over = [
            row.push(token, first, self.ends, self.tokenizer)
            for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True)
        ]
        return torch.tensor(over, device=input_ids.device)
