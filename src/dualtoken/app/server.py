"""The HTTP server: which routes there are, and those that are short (`http_chat.py` has the chat)."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile

from dualtoken.app.batching import Job
from dualtoken.app.engine import Drawing, Engine
from dualtoken.app.http_border import Border
from dualtoken.app.http_chat import ChatRoute
from dualtoken.app.http_errors import ApiError, add_error_handlers
from dualtoken.app.http_pictures import to_base64, to_data_url
from dualtoken.app.http_requests import Codes, DetokenizeRequest, ImageRequest, TokenizeRequest
from dualtoken.app.http_service import ServerConfig, Service
from dualtoken.core.codes import DualCodes
from dualtoken.mllm.assistant import user

NESTED = re.compile(r"(pixel|semantic)\[(\w+)\]")  # how forms spell fields of fields


def build(engine: Engine, config: ServerConfig) -> FastAPI:
    """The app; its queue runs while it does."""
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await anyio.to_thread.run_sync(service.batcher.close)

    app = FastAPI(title="DualToken", lifespan=lifespan)
    app.state.service = service
    add_error_handlers(app)
    app.add_middleware(Border, config=config.border, metrics=service.metrics)
    routes = Routes(service)
    for path, method, handler in (
        ("/v1/chat/completions", "POST", ChatRoute(service).reply),
        ("/v1/images/generations", "POST", routes.generate),
        ("/v1/images/edits", "POST", routes.edit),
        ("/v1/tokenize", "POST", routes.tokenize),
        ("/v1/detokenize", "POST", routes.detokenize),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{name:path}", "GET", routes.one_model),
        ("/health", "GET", routes.health),
        ("/metrics", "GET", routes.metrics),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return app


class Routes:
    """Pictures, codes, models, and how the server is."""

    def __init__(self, service: Service):
        self.service, self.engine, self.started = service, service.engine, int(time.time())

    async def generate(self, body: ImageRequest, request: Request) -> Response:
        """Pictures of a prompt."""
        return await self._draw(request, body, None)

    async def edit(self, request: Request) -> Response:
        """A picture changed as a prompt says; a multipart form."""
        self.service.batcher.check_room()
        async with request.form(max_files=4, max_fields=64) as form:
            body, files = _read_form(form.multi_items())
            if len(files) != 1:
                raise ApiError(400, f"image: {len(files)} files; send one, as multipart/form-data", "image")
            picture = await self.service.picture(request, await files[0].read(), "image")
        return await self._draw(request, ImageRequest.model_validate(body), picture)

    async def _draw(self, request: Request, body: ImageRequest, picture: Image.Image | None) -> Response:
        service, side = self.service, self.engine.size
        service.check_model(body.model)
        if body.size not in (None, "auto", f"{side}x{side}"):
            raise ApiError(400, f"size: the model draws {side}x{side}; give that, or auto", "size")
        if body.stream:
            raise ApiError(400, "stream: pictures are not streamed", "stream")
        if body.n > service.config.batch.max_queue:
            raise ApiError(400, f"n: this server's queue holds {service.config.batch.max_queue}", "n")
        service.batcher.check_room(body.n)
        chat = [user(body.prompt) if picture is None else user(body.prompt, picture)]
        await service.prompt_length(chat, 1 + self.engine.positions, "prompt")
        config, seed = body.of(self.engine.model.draw_config), service.seed(body.seed)
        kind = "draw" if picture is None else "edit"
        jobs = [Job(kind, config, Drawing(body.prompt, seed + j, picture)) for j in range(body.n)]
        drawn = await service.run(request, jobs, "prompt")
        answer = await service.in_thread(_pictures, drawn, body.response_format, body.output_format)
        for number, entry in enumerate(answer["data"]):
            entry["seed"] = seed + number
        return JSONResponse(answer | {"size": f"{side}x{side}", "output_format": body.output_format})

    async def tokenize(self, body: TokenizeRequest, request: Request) -> Response:
        """Pictures as codes: [N, D] in both vocabularies."""
        self.service.check_model(body.model)
        self.service.batcher.check_room(len(body.images))
        pictures = [await self.service.picture(request, url, f"images[{i}]") for i, url in enumerate(body.images)]
        found = await self.service.run(request, [Job("encode", None, picture) for picture in pictures], "images")
        data = [
            {"index": i, "pixel": codes.pixel[0].tolist(), "semantic": codes.semantic[0].tolist()}
            for i, codes in enumerate(found)
        ]
        return JSONResponse({"object": "list", "model": self.service.config.name, "data": data} | self._sizes())

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> Response:
        """Codes as pictures; semantic codes are not needed for that."""
        self.service.check_model(body.model)
        jobs = [Job("decode", None, self._codes(codes, f"codes[{i}].pixel")) for i, codes in enumerate(body.codes)]
        pictures = await self.service.run(request, jobs, "codes")
        answer = await self.service.in_thread(_pictures, pictures, body.response_format, body.output_format)
        return JSONResponse(answer)

    def _codes(self, codes: Codes, param: str) -> DualCodes:
        """Raises ApiError for codes that the tokenizer could not have made."""
        sizes = self._sizes()
        positions, depth, rows = sizes["positions"], sizes["depth"], sizes["codebook_size"]
        if len(codes.pixel) != positions or any(len(row) != depth for row in codes.pixel):
            raise ApiError(400, f"{param}: give {positions} positions of {depth} codes each", param)
        if any(not 0 <= code < rows for row in codes.pixel for code in row):
            raise ApiError(400, f"{param}: codes are whole numbers from 0 to {rows - 1}", param)
        pixel = torch.tensor(codes.pixel)[None]
        return DualCodes(pixel, torch.zeros_like(pixel))

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The model, if that is its name."""
        self.service.check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        name = self.service.config.name
        about = {"id": name, "object": "model", "created": self.started, "owned_by": "dualtoken"}
        return about | {"context": self.engine.context, "image_size": self.engine.size} | self._sizes()

    def _sizes(self) -> dict[str, int]:
        """N, D and K of pixel codes."""
        head = self.engine.model.config.pixel_head
        return {"positions": self.engine.positions, "depth": head["depth"], "codebook_size": head["codebook_size"]}

    async def health(self) -> Response:
        """Whether the model's thread lives."""
        alive = self.service.batcher.alive
        state = {"status": "ok" if alive else "stopped", "waiting": len(self.service.batcher.waiting)}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _read_form(items: list[tuple[str, str | UploadFile]]) -> tuple[dict[str, Any], list[UploadFile]]:
    """Fields of a form as JSON has them, and the files of "image"."""
    body: dict[str, Any] = {}
    files: list[UploadFile] = []
    for key, value in items:
        if isinstance(value, UploadFile):
            if key not in ("image", "image[]"):
                raise ApiError(400, f"{key}: this file is not supported", key)
            files.append(value)
        elif nested := NESTED.fullmatch(key):
            if not isinstance(body.get(nested[1], {}), dict):
                raise ApiError(400, f"{key}: {nested[1]} has a value of its own; give one of both", key)
            body.setdefault(nested[1], {})[nested[2]] = value
        else:
            body[key] = value
    return body, files


def _pictures(pictures: list[Image.Image], how: str, kind: str) -> dict[str, Any]:
    """An answer of pictures, `how` "b64_json" or "url" (a data URL)."""
    write = to_data_url if how == "url" else to_base64
    return {"created": int(time.time()), "data": [{how: write(picture, kind)} for picture in pictures]}
