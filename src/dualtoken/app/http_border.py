"""What every request meets first: the API key, the limits of its body, and the counters of `/metrics`."""

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualtoken.app.http_errors import ApiError

OPEN = ("/health",)  # needs no key


@dataclass
class BorderConfig:
    """What is let in.

    Args:
        max_bytes: of a request's body.
        body_seconds: longest that a client may take to send it.
        api_key: what clients must send as "Authorization: Bearer KEY"; None = nothing.
        hosts: names by which the server may be asked, without ports, and whose pages may ask it; None = any. Else a
            page of any website could, through the browser of who runs the server.
    """

    max_bytes: int = 20_000_000
    body_seconds: float = 60.0
    api_key: str | None = None
    hosts: frozenset[str] | None = None


class Metrics:
    """Prometheus metrics of one server. Args: waiting: how many rows wait now."""

    def __init__(self, waiting: Callable[[], int]):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("dualtoken_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "dualtoken_request_seconds", "From a request to the end of its answer", ["route"], registry=registry
        )
        self.left = Counter(
            "dualtoken_requests_left", "Requests whose client left, or whose time was up", registry=registry
        )
        self.rows = Histogram(
            "dualtoken_batch_rows", "Rows run together", ["kind"], registry=registry, buckets=[1, 2, 4, 8, 16, 32, 64]
        )
        self.batch_seconds = Histogram(
            "dualtoken_batch_seconds", "Time that the model took for a batch", ["kind"], registry=registry
        )
        Gauge("dualtoken_waiting_rows", "Rows that wait for the model", registry=registry).set_function(waiting)

    def observe(self, kind: str, rows: int, seconds: float) -> None:
        """A batch was run."""
        self.rows.labels(kind).observe(rows)
        self.batch_seconds.labels(kind).observe(seconds)


class Border:
    """Middleware: refuses what must not come in, before it is read whole, and counts all requests."""

    def __init__(self, app: ASGIApp, config: BorderConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 500
        scope.setdefault("state", {})["arrived"] = started

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response(scope, receive, note)
            else:
                await self.app(scope, self._limited(receive), note)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # never the path as sent: anyone could make new ones
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.config.hosts is not None and scope["path"] not in OPEN:
            asked = {"Host": f"//{headers.get('host', '')}", "Origin": headers.get("origin")}
            for header, address in asked.items():
                if address is not None and host_of(address) not in self.config.hosts:
                    return ApiError(403, f"{header}: not a name of this server; see --hosts of dualtoken serve")
        if self.config.api_key is not None and scope["path"] not in OPEN:
            given, wanted = headers.get("authorization", ""), f"Bearer {self.config.api_key}"
            if not hmac.compare_digest(given.encode("latin-1"), wanted.encode()):
                return ApiError(401, "wrong or no API key: send Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.config.max_bytes:
            return ApiError(413, self._too_large)
        return None

    @property
    def _too_large(self) -> str:
        return f"the request is larger than {self.config.max_bytes:,} bytes"

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts bytes and time until the body is whole; HTTPException is what FastAPI lets through."""
        until, size, whole = time.monotonic() + self.config.body_seconds, 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {self.config.body_seconds:g} s") from None
            size += len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if size > self.config.max_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited


def host_of(address: str) -> str | None:
    """The host of an address, None where it has none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
