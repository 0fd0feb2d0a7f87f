"""`/v1/chat/completions`: replies in words, and in words and pictures, whole or as a stream of server-sent events.

Pictures that the model draws come in `message.images` (of a stream: in a last delta), each a data URL with its place
in the text.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dualtoken.app.batching import Job
from dualtoken.app.engine import Reply, Saying
from dualtoken.app.http_errors import ApiError, as_api_error
from dualtoken.app.http_pictures import to_data_url
from dualtoken.app.http_requests import ChatRequest
from dualtoken.app.http_service import Service
from dualtoken.app.text_rows import TextConfig
from dualtoken.mllm.assistant import Chat

PICTURES = 16  # of one request


@dataclass
class Listener:
    """Takes the text so far from the model's thread and hands what is new to the event loop."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)  # of str; None at the end
    sent: str = ""

    def __call__(self, text: str) -> None:
        if len(text) > len(self.sent) and text.startswith(self.sent):  # a batch that is run again says it again
            piece, self.sent = text[len(self.sent) :], text
            self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)


class ChatRoute:
    """The route."""

    def __init__(self, service: Service):
        self.service, self.engine = service, service.engine

    async def reply(self, body: ChatRequest, request: Request) -> Response:
        service = self.service
        service.check_model(body.model)
        service.batcher.check_room()
        chat = await self._chat(request, body)
        prompt = await service.prompt_length(chat, 1, "messages")
        listener = Listener() if body.stream else None
        job = self._job(body, chat, prompt, listener)
        if listener is None:
            (reply,) = await service.run(request, [job], "messages")
            return JSONResponse(await service.in_thread(self._whole, reply, prompt))
        service.batcher.submit([job])
        pieces = self._pieces(job, listener, service.deadline(request))
        first = await service.wait(request, anext(pieces), [job], "messages")  # early errors have their own status
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = self._events(job, first, pieces, prompt, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _chat(self, request: Request, body: ChatRequest) -> Chat:
        """Messages as the processor takes them, with pictures opened."""
        chat, pictures = [], 0
        for number, message in enumerate(body.messages):
            content: list[dict[str, Any]] = []
            for piece in message.pieces():
                if piece.url is None:
                    content.append({"type": "text", "text": piece.text})
                    continue
                pictures += 1
                if pictures > PICTURES:
                    raise ApiError(400, f"messages: more than {PICTURES} pictures", "messages")
                picture = await self.service.picture(request, piece.url, f"messages[{number}].{piece.field}")
                content.append({"type": "image", "image": picture})
            chat.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return chat

    def _job(self, body: ChatRequest, chat: Chat, prompt: int, listener: Listener | None) -> Job:
        """The row of a request. Raises ApiError where the model has no room for the tokens asked for."""
        room, (limit, name) = self.engine.context - prompt, body.limit
        if limit is not None and limit > room:
            raise self.service.too_long(f"{limit:,} tokens of reply after a prompt of {prompt:,}", name)
        draws = "image" in body.modalities
        config = TextConfig(
            max_tokens=limit or (room if draws else self.engine.longest(prompt)),
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            seed=self.service.seed(body.seed),
            stop=tuple(body.stop),
        )
        said = Saying(chat, config, listener, body.max_images)
        if draws:
            return Job("tell", body.of(self.engine.model.draw_config), said, alone=True)
        return Job("ask", config.max_tokens, said)

    async def _pieces(self, job: Job, listener: Listener, until: float) -> AsyncIterator[str | Reply]:
        """The text as it is written, then the whole reply."""
        done = asyncio.wrap_future(job.done)

        def over(found: asyncio.Future) -> None:
            _ = found.cancelled() or found.exception()  # looked at, in case nobody waits any more
            listener.queue.put_nowait(None)

        done.add_done_callback(over)
        while True:
            try:
                piece = await asyncio.wait_for(listener.queue.get(), until - time.monotonic())
            except TimeoutError:
                raise self.service.too_late from None
            if piece is None:
                break
            yield piece
        reply: Reply = done.result()
        if reply.text.startswith(listener.sent) and len(reply.text) > len(listener.sent):
            yield reply.text[len(listener.sent) :]
        yield reply

    async def _events(
        self, job: Job, first: str | Reply, pieces: AsyncIterator[str | Reply], prompt: int, usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events of a reply; however they end, the row is let go."""
        head = self._head("chat.completion.chunk")

        def event(delta: dict[str, Any], finish: str | None = None) -> str:
            return _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        try:
            yield event({"role": "assistant", "content": ""})
            piece: str | Reply = first
            while isinstance(piece, str):
                yield event({"content": piece})
                piece = await anext(pieces)
            if piece.pictures:
                yield event({"images": await self.service.in_thread(_images, piece)})
            yield event({}, piece.finish)
            if usage:
                yield _event(head | {"choices": [], "usage": self._usage(piece, prompt)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the error comes as an event
            yield _event(as_api_error(error, "messages").body)
        finally:
            if not job.done.done():
                self.service.metrics.left.inc()
                job.leave()

    def _whole(self, reply: Reply, prompt: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.pictures:
            message["images"] = _images(reply)
        choice = {"index": 0, "message": message, "finish_reason": reply.finish, "logprobs": None}
        return self._head("chat.completion") | {"choices": [choice], "usage": self._usage(reply, prompt)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.service.config.name,
        }

    def _usage(self, reply: Reply, prompt: int) -> dict[str, int]:
        """Tokens; a drawn picture counts as its positions."""
        made = reply.tokens + len(reply.pictures) * self.engine.positions
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _images(reply: Reply) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": to_data_url(picture)}, "offset": offset, "index": index}
        for index, (offset, picture) in enumerate(reply.pictures)
    ]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
