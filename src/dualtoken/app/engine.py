"""What the server does with the model: one function for each kind of work, each for a batch of rows.

All of it runs in the thread of the queue (`app/batching.py`), but for what is said to be safe in any thread.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from dualtoken.app.batching import Job, check_awaited
from dualtoken.app.text_rows import FollowRows, OwnRandomness, TextConfig, TextRow
from dualtoken.core.codes import DualCodes
from dualtoken.core.images import fit_image
from dualtoken.generation.sampling import DrawConfig
from dualtoken.generation.text import MAX_NEW_TOKENS, stop_ids
from dualtoken.mllm.assistant import Assistant, Chat


@dataclass
class Saying:
    """A chat to reply to; pictures are drawn, at most `max_images`, where the kind of work is "tell".

    Args: listen: told the text so far, whenever there is more.
    """

    chat: Chat
    config: TextConfig
    listen: Callable[[str], None] | None = None
    max_images: int = 0


@dataclass
class Drawing:
    """A picture to draw, or to draw anew as the prompt says."""

    prompt: str
    seed: int
    picture: Image.Image | None = None


@dataclass
class Reply:
    """What was said and drawn.

    Args: finish: "stop" or "length"; tokens: of the words; pictures: each with its place in the text, in characters.
    """

    text: str
    finish: str
    tokens: int
    pictures: list[tuple[int, Image.Image]] = field(default_factory=list)


class Engine:
    """The model at the service of the queue."""

    def __init__(self, assistant: Assistant):
        self.assistant, self.model = assistant, assistant.model
        self.size = assistant.processor.image_processor.size
        # A text tokenizer keeps state between calls (whether special tokens are text), so threads must not share one.
        self._counting, self._lock = copy.deepcopy(assistant.processor), threading.Lock()

    @property
    def positions(self) -> int:
        """N, code positions of a picture."""
        return self.model.config.positions

    @property
    def context(self) -> int:
        """Longest sequence that the model takes, in tokens."""
        return self.model.context

    def fit(self, picture: Image.Image) -> Image.Image:
        """A picture as the model sees it, so that what waits is small. Safe in any thread."""
        return fit_image(picture, self.size)

    def length(self, chat: Chat) -> int:
        """Tokens of a prompt. Raises UserError for a chat that cannot be replied to. Safe in any thread."""
        with self._lock:
            return self._counting.apply_chat_template([chat], add_generation_prompt=True)["input_ids"].shape[1]

    def longest(self, prompt: int) -> int:
        """How many tokens of a reply are made where the request does not say."""
        return min(MAX_NEW_TOKENS, self.context - prompt)

    def run(self, jobs: list[Job]) -> list[Any]:
        """Rows of one kind with equal settings -> a result for each."""
        return KINDS[jobs[0].kind](self, jobs)

    def ask(self, jobs: list[Job]) -> list[Reply]:
        """Saying, settings: most tokens -> replies in words."""
        rows, chats = [_row(job) for job in jobs], [job.payload.chat for job in jobs]
        self.assistant.ask(chats, max_new_tokens=jobs[0].settings, **self._following(rows))
        return [self._reply(row) for row in rows]

    def tell(self, jobs: list[Job]) -> list[Reply]:
        """Saying, settings: DrawConfig -> replies in words and pictures, one row a batch: rows end at other times."""
        (job,) = jobs
        said, row = job.payload, _row(job)
        parts = self.assistant.tell(
            [said.chat], said.max_images, job.settings, [said.config.seed], lambda *_: check_awaited(jobs),
            **self._following([row]),
        )[0]  # fmt: skip
        reply, before = self._reply(row), []
        if row.stretches and row.stretches[-1][-1] == self.model.config.draw_start_id:
            reply.finish = "length"  # a limit kept it from drawing, or from going on after it
        for part in parts:
            if isinstance(part, str):
                before.append(part)
            else:
                reply.pictures.append((min(len("\n\n".join(before)), len(reply.text)), part))
        return [reply]

    def draw(self, jobs: list[Job]) -> list[Image.Image]:
        """Drawing, settings: DrawConfig -> pictures."""
        drawings: list[Drawing] = [job.payload for job in jobs]
        config: DrawConfig = jobs[0].settings
        prompts, seeds = [d.prompt for d in drawings], [d.seed for d in drawings]
        made = self.assistant.draw(prompts, 1, config, seeds, lambda *_: check_awaited(jobs))
        return [one for (one,) in made]

    def edit(self, jobs: list[Job]) -> list[Image.Image]:
        """Drawing with a picture, settings: DrawConfig -> pictures."""
        drawings: list[Drawing] = [job.payload for job in jobs]
        pictures, prompts = [d.picture for d in drawings], [d.prompt for d in drawings]
        seeds = [d.seed for d in drawings]
        made = self.assistant.edit(pictures, prompts, 1, jobs[0].settings, seeds, lambda *_: check_awaited(jobs))
        return [one for (one,) in made]

    @torch.no_grad()
    def encode(self, jobs: list[Job]) -> list[DualCodes]:
        """Pictures -> codes of one each, pixel [1, N, D] and semantic [1, P + N, D]."""
        tokenizer = self.model.vision_tokenizer
        pixels = self.assistant.processor.image_processor([job.payload for job in jobs])["pixel_values"]
        codes = tokenizer.encode(pixels.to(tokenizer.device, tokenizer.dtype)).to("cpu")
        return [codes[i] for i in range(len(jobs))]

    def decode(self, jobs: list[Job]) -> list[Image.Image]:
        """Codes of one picture each -> pictures."""
        images = self.model.decode_image_tokens(DualCodes.cat([job.payload for job in jobs]))
        return self.assistant.processor.image_processor.postprocess(images)

    def _following(self, rows: Sequence[TextRow]) -> dict[str, Any]:
        """Options of transformers' generate that give each row its own."""
        ends = {*stop_ids(self.model), self.model.config.draw_start_id}
        options: dict[str, Any] = {
            "stopping_criteria": StoppingCriteriaList([FollowRows(rows, self.assistant.processor.tokenizer, ends)])
        }
        if any(row.config.temperature > 0 for row in rows):
            options["logits_processor"] = LogitsProcessorList([OwnRandomness(rows)])
        return options

    def _reply(self, row: TextRow) -> Reply:
        return Reply(row.end(self.assistant.processor.tokenizer), row.finish, row.count)


def _row(job: Job) -> TextRow:
    """The reply of a job, not begun."""
    return TextRow(job.payload.config, job.payload.listen, lambda: job.left)


KINDS = {
    "ask": Engine.ask,
    "tell": Engine.tell,
    "draw": Engine.draw,
    "edit": Engine.edit,
    "encode": Engine.encode,
    "decode": Engine.decode,
}
