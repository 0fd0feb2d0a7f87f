"""What all routes share: the model's queue, waiting for an answer, opening pictures, checks of fields."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from fastapi import Request
from PIL import Image

from dualtoken.app.batching import BatchConfig, Batcher, Job
from dualtoken.app.engine import Engine
from dualtoken.app.http_border import BorderConfig, Metrics
from dualtoken.app.http_errors import ApiError, as_api_error
from dualtoken.app.http_pictures import PictureLimits, open_picture, open_url
from dualtoken.app.http_requests import SEEDS
from dualtoken.mllm.assistant import Chat

T = TypeVar("T")
THREADS = 4  # that decode pictures and count tokens: a decoded picture is large (one whose time is up ends its own)
CHARACTERS = 64  # more of them than this for each token of the context are too many without counting


@dataclass
class ServerConfig:
    """A server.

    Args:
        name: of the model, as clients say it.
        timeout_s: longest that a request may take, from its arrival to the end of its answer.
    """

    name: str = "mini"
    timeout_s: float = 300.0
    batch: BatchConfig = field(default_factory=BatchConfig)
    pictures: PictureLimits = field(default_factory=PictureLimits)
    border: BorderConfig = field(default_factory=BorderConfig)


class Service:
    """The model, its queue, and how routes use them."""

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine, self.config = engine, config
        self.metrics = Metrics(lambda: len(self.batcher.waiting))
        self.batcher = Batcher(engine.run, config.batch, self.metrics.observe)
        self._threads, self._fetchers = anyio.CapacityLimiter(THREADS), anyio.CapacityLimiter(THREADS)

    async def in_thread(self, function: Callable[..., T], *arguments: Any, remote: bool = False) -> T:
        """What would keep other requests waiting; what is fetched has threads of its own, for it may be slow."""
        limiter = self._fetchers if remote else self._threads
        return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter, abandon_on_cancel=True)

    async def run(self, request: Request, jobs: Sequence[Job], param: str) -> list[Any]:
        """All rows of a request through the model. Raises QueueFull, and ApiError about `param`."""
        self.batcher.submit(jobs)
        return await self.wait(request, asyncio.gather(*(asyncio.wrap_future(j.done) for j in jobs)), jobs, param)

    async def wait(self, request: Request, result: Awaitable[T], jobs: Sequence[Job], param: str) -> T:
        """The result, while the client stays and time is left; else, and after an error, the rows are let go."""
        waiter, watcher = asyncio.ensure_future(result), asyncio.create_task(_gone(request))
        try:
            left = self.deadline(request) - time.monotonic()
            await asyncio.wait({waiter, watcher}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if waiter.cancelled():
                raise ApiError(503, "the server is stopping")
            if waiter.done():
                return waiter.result()
            self.metrics.left.inc()
            if watcher.done():
                raise ApiError(499, "the client left")
            raise self.too_late
        except BaseException as error:
            for job in jobs:
                job.leave()
            if isinstance(error, Exception):
                raise as_api_error(error, param) from error
            raise
        finally:
            watcher.cancel()
            waiter.cancel()

    def deadline(self, request: Request) -> float:
        """When a request's time is up, on the clock of `time.monotonic`."""
        return request.state.arrived + self.config.timeout_s

    @property
    def too_late(self) -> ApiError:
        return ApiError(504, f"not done within {self.config.timeout_s:g} s", code="timeout")

    async def picture(self, request: Request, source: str | bytes, param: str) -> Image.Image:
        """A picture given by URL or as a file's bytes, at the model's size. Raises ApiError, also when time is up."""
        open_any = open_url if isinstance(source, str) else open_picture
        remote = isinstance(source, str) and not source.startswith("data:")
        opening = self.in_thread(lambda: self.engine.fit(open_any(source, param, self.config.pictures)), remote=remote)
        try:
            return await asyncio.wait_for(opening, self.deadline(request) - time.monotonic())
        except TimeoutError:
            self.metrics.left.inc()
            raise self.too_late from None

    async def prompt_length(self, chat: Chat, reply: int, param: str) -> int:
        """Tokens of a prompt. Raises ApiError where it does not leave room for `reply` tokens."""
        said = sum(len(part.get("text", "")) for message in chat for part in message["content"])
        if said > CHARACTERS * self.engine.context:
            raise self.too_long(f"{said:,} characters", param)
        try:
            length = await self.in_thread(self.engine.length, chat)
        except Exception as error:
            raise as_api_error(error, param) from error
        if length + reply > self.engine.context:
            raise self.too_long(f"{length:,} tokens, and the reply needs {reply:,}", param)
        return length

    def too_long(self, found: str, param: str) -> ApiError:
        """An error as OpenAI's clients know it."""
        message = f"{param}: {found}; the model takes {self.engine.context:,} tokens in all"
        return ApiError(400, message, param, "context_length_exceeded")

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if name not in (None, self.config.name):
            raise ApiError(
                404, f"model: {name!r} is not served here; {self.config.name!r} is", "model", "model_not_found"
            )

    def seed(self, given: int | None) -> int:
        """The seed of a request, a random one where it does not say."""
        return random.randrange(SEEDS) if given is None else given


async def _gone(request: Request) -> None:
    """Until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
