"""`dualtoken serve`: the model behind an OpenAI-compatible HTTP server (`docs/serve.md`)."""

import ipaddress
import os
import socket
from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawEngine
from dualtoken.mllm.presets import mllm_directory
from dualtoken.tokenizer.presets import BUNDLED

KEY = "DUALTOKEN_API_KEY"  # not an option, which other users of the machine could read
LOCAL = ("127.0.0.1", "::1", "localhost")
NEEDED = ("anyio", "fastapi", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def serve(
    model: str = "mini",
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_batch: int = 8,
    max_wait_ms: float = 10.0,
    max_queue: int = 64,
    timeout_s: float = 300.0,
    max_request_mb: float = 20.0,
    max_pixels: int = 16_000_000,
    allow_urls: bool = False,
    engine: DrawEngine | None = None,
    hosts: str | None = None,
) -> None:
    """Serve a multimodal model until Ctrl-C. With DUALTOKEN_API_KEY in the environment, clients must send that key.

    Args:
        model: a preset, or the directory of a multimodal model.
        host: address to listen at; 0.0.0.0 = all of this machine.
        port: port to listen at; 0 = any that is free.
        name: of the model, as clients say it; by default the preset's, or the directory's.
        max_batch: replies and pictures that are made together.
        max_wait_ms: longest wait for others to join while the model idles.
        max_queue: replies and pictures that may wait; further requests get status 429.
        timeout_s: longest that a request may take.
        max_request_mb: largest request, in millions of bytes.
        max_pixels: largest picture in a request, width x height.
        allow_urls: fetch pictures from public addresses that a request names.
        engine: how pictures are computed (docs/benchmarks.md): graph and compiled are for GPUs, auto chooses; default:
            the model's (auto in new ones).
        hosts: without a key: names beside localhost by which the server may be asked, with commas between them, as
            those of a proxy before it; any name where it is not given and the server listens to other machines.
    """
    for option, value in (("timeout_s", timeout_s), ("max_request_mb", max_request_mb), ("max_pixels", max_pixels)):
        if value <= 0:
            raise UserError(f"--{option} {value}: give more than 0")
    mllm_directory(model)  # a wrong name is said before anything is loaded
    try:
        import python_multipart  # noqa: F401 (FastAPI asks for it only when a form arrives)
        import uvicorn

        from dualtoken.app.http_service import ServerConfig
        from dualtoken.app.server import build
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise UserError(f"dualtoken serve needs {error.name}: pip install 'dualtoken[serve]'") from None
    from dualtoken.app.batching import BatchConfig
    from dualtoken.app.engine import Engine
    from dualtoken.app.http_border import BorderConfig
    from dualtoken.app.http_pictures import PictureLimits
    from dualtoken.mllm.assistant import Assistant

    most, key = int(max_request_mb * 1e6), os.environ.get(KEY) or None
    config = ServerConfig(
        name or (model if model in BUNDLED else Path(model).resolve().name),
        timeout_s,
        BatchConfig(max_batch, max_wait_ms, max_queue),
        PictureLimits(max_pixels, most, allow_urls),
        BorderConfig(most, api_key=key, hosts=names(host, hosts) if key is None else None),
    )
    listening = _listen(host, port)
    app = build(Engine(Assistant.open(model, engine=engine)), config)
    port = listening.getsockname()[1]
    print(f"{config.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C stops", flush=True)
    if not _local(host) and key is None:
        print(f"warning: whoever reaches {host} may use it; set {KEY} to ask for a key", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)).run([listening])


def names(host: str, hosts: str | None) -> frozenset[str] | None:
    """The names by which a server without a key may be asked; None = any. Raises UserError for what is no name."""
    if hosts is None and not _local(host):
        return None
    from dualtoken.app.http_border import host_of

    given = [name.strip().lower() for name in (hosts or host).split(",")]
    for name in given:
        if name != host_of(f"//[{name}]" if ":" in name else f"//{name}"):
            raise UserError(f"--hosts {name}: give names alone, as models.example.org, without http:// and port")
    return frozenset([*LOCAL, host.lower(), *given])


def _local(host: str) -> bool:
    """Whether an address to listen at is of this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another port, or stop what uses it") from None
