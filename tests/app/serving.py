"""A real server on a tiny model in a thread, and what its tests share."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image

from dualtoken.app.engine import Engine
from dualtoken.app.http_service import ServerConfig
from dualtoken.app.server import build
from dualtoken.mllm.assistant import Assistant
from tests.generation.lively import lively

MODEL = "tiny"
SECONDS = 30  # longer than any of it takes


@contextmanager
def running(config=None, engine=None):
    """A server; gives its address and its service."""
    app = build(engine or Engine(Assistant(*lively())), config or ServerConfig(MODEL))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + SECONDS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state.service
    finally:
        server.should_exit = True
        thread.join(SECONDS)


def png(color="red", size=(20, 16), kind="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def data_url(data=None, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data or png()).decode()}"


def opened(text):
    """The picture of a base64 text or a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(text.rsplit(",", 1)[-1])))


def alike(one, other):
    """Equal codes: decoding in another batch may round a value differently."""
    return np.abs(np.array(one, np.int16) - np.array(other, np.int16)).max() <= 1


def eventually(condition):
    """Wait until it holds; False where it never does."""
    until = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def chat(client, content="what is the colour of the star ?", **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 8} | options)
