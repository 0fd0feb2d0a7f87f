"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, with the field's name as `param`."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dualtoken.app.batching import QueueFull
from dualtoken.core.errors import UserError

log = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args: param: the field that it is about; code: OpenAI's name of the error, where it has one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Any error as what the client may know of it; `param` is the field that a UserError is about."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            seconds = {"Retry-After": str(error.retry_after)}
            return ApiError(429, f"the server is busy: {error}", code="queue_full", headers=seconds)
        case UserError():
            return ApiError(400, f"{param}: {error}" if param else str(error), param)
        case RequestValidationError() | ValidationError():
            return _of_fields(error.errors())
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response

    for kind in (ApiError, QueueFull, UserError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def field_name(place: Sequence[str | int]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _of_fields(problems: Sequence[dict[str, Any]]) -> ApiError:
    """The first of pydantic's problems; what was sent is not repeated, as it may be a whole picture."""
    first = problems[0]
    place = list(first["loc"])
    if place[:1] == ["body"]:
        place = place[1:]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']} at character {place[0]}")
    name = field_name(place)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this field is not supported"
    if not name:
        return ApiError(400, f"the body: {message}; send JSON with content type application/json")
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ApiError(400, f"{name}: {message}{others}", name)
