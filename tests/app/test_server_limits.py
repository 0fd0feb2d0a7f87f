"""What the server does where it is too much, too late, or goes wrong."""
# ruff: noqa: E402 (what is missing is found out first)

import asyncio
import http.server
import socket
import sys
import threading

import httpx
import numpy as np
import pytest
import torch

for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "openai"):
    pytest.importorskip(name)

import openai

from dualtoken.app import http_pictures, http_remote, serve
from dualtoken.app.batching import BatchConfig
from dualtoken.app.engine import Engine
from dualtoken.app.http_border import BorderConfig
from dualtoken.app.http_pictures import PictureLimits
from dualtoken.app.http_service import ServerConfig
from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant
from tests.app.serving import MODEL, SECONDS, alike, chat, data_url, eventually, png, running
from tests.generation.lively import lively
from tests.mllm.test_assistant import script


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*lively())


class Slow:
    """An engine whose drawings wait until told to go on."""

    def __init__(self):
        self.engine = Engine(Assistant(*lively()))
        self.begun, self.go = threading.Event(), threading.Event()
        draw, self.ended = self.engine.model.pixel_head.step, []

        def step(*arguments):
            self.begun.set()
            self.go.wait(0.5)
            return draw(*arguments)

        self.engine.model.pixel_head.step = step
        run = self.engine.run

        def noted(jobs):
            try:
                return run(jobs)
            finally:
                self.ended.append(len(jobs))

        self.engine.run = noted


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.go.set()


def post(url, seed=0, **options):
    body = {"prompt": "a star", "seed": seed, "guidance": 1 + seed / 8}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=SECONDS, **options)


def test_a_full_queue_is_said_with_when_to_come_again(slow):
    with running(ServerConfig(MODEL, batch=BatchConfig(max_batch=1, max_queue=2)), slow.engine) as (url, service):
        threads = [threading.Thread(target=post, args=(url,))]
        threads[0].start()
        assert slow.begun.wait(SECONDS)
        threads += [threading.Thread(target=post, args=(url, 1)) for _ in range(2)]
        for thread in threads[1:]:
            thread.start()
        assert eventually(lambda: len(service.batcher.waiting) == 2)
        answer = post(url)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            chat(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
        slow.go.set()
        for thread in threads:
            thread.join(SECONDS)
        assert post(url).status_code == 200


def test_work_ends_when_the_client_leaves(slow):
    with running(ServerConfig(MODEL, batch=BatchConfig(max_batch=1)), slow.engine) as (url, service):

        async def leave():
            async with httpx.AsyncClient() as one:
                body = {"prompt": "a star", "seed": 0}
                task = asyncio.create_task(one.post(f"{url}/v1/images/generations", json=body))
                assert await asyncio.to_thread(slow.begun.wait, SECONDS)
                queued = asyncio.create_task(one.post(f"{url}/v1/images/generations", json=body | {"seed": 1}))
                assert await asyncio.to_thread(eventually, lambda: len(service.batcher.waiting) == 1)
                for left in (task, queued):
                    left.cancel()
                await asyncio.gather(task, queued, return_exceptions=True)

        asyncio.run(leave())
        assert eventually(lambda: slow.ended == [1])  # the drawing was given up, the one that waited never begun
        assert eventually(lambda: service.metrics.left._value.get() == 2)
        slow.go.set()
        assert post(url).status_code == 200 and slow.ended == [1, 1]


def test_a_stream_ends_when_the_client_leaves():
    engine = Engine(Assistant(*lively()))
    with running(ServerConfig(MODEL), engine) as (url, service):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        steps, output = [], engine.model.llm.get_output_embeddings()
        go = threading.Event()

        def note(*_):
            steps.append(1)
            if len(steps) > 4:
                go.wait(0.2)

        hook = output.register_forward_hook(note)
        stream = chat(client, max_tokens=60, stream=True)
        next(stream), next(stream)
        stream.close()
        assert eventually(lambda: service.metrics.left._value.get() == 1)
        go.set()
        assert eventually(lambda: service.batcher.seconds != 1.0)  # the batch is over
        hook.remove()
        assert len(steps) < 40
        assert chat(client, max_tokens=1).choices


def test_late_requests_are_given_up(slow):
    with running(ServerConfig(MODEL, timeout_s=2), slow.engine) as (url, _):
        answer = post(url)
        assert answer.status_code == 504 and "2 s" in answer.json()["error"]["message"]
        assert eventually(lambda: slow.ended == [1])
        slow.go.set()
        assert post(url).status_code == 200


class OnePicture(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png("blue"))

    def log_message(self, *arguments):
        pass


def test_pictures_of_addresses_are_fetched_where_that_is_allowed(assistant, monkeypatch):
    monkeypatch.setattr(http_remote, "is_public", lambda address: address == "127.0.0.1")
    config = ServerConfig(MODEL, pictures=PictureLimits(allow_urls=True))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), OnePicture) as pictures,
        running(config, Engine(assistant)) as (url, _),
    ):
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        shown = [f"http://127.0.0.1:{pictures.server_port}/x.png", data_url(png("blue"))]
        found = httpx.post(f"{url}/v1/tokenize", json={"images": shown}, timeout=SECONDS).json()["data"]
        pictures.shutdown()
        elsewhere = httpx.post(f"{url}/v1/tokenize", json={"images": ["http://127.0.0.2:1/x.png"]}, timeout=SECONDS)
        assert elsewhere.status_code == 400 and "not on the public internet" in elsewhere.text
    assert found[0]["pixel"] == found[1]["pixel"]


def test_the_time_of_a_request_is_also_that_of_its_pictures(assistant, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(http_pictures, "fetch", lambda *_: go.wait(SECONDS) and png())
    config = ServerConfig(MODEL, timeout_s=0.3, pictures=PictureLimits(allow_urls=True))
    slow = "http://example.com/x.png"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": slow}]}]
    with running(config, Engine(assistant)) as (url, _):
        for path, body in (("tokenize", {"images": [slow]}), ("chat/completions", {"messages": messages})):
            answer = httpx.post(f"{url}/v1/{path}", json={"model": MODEL} | body, timeout=SECONDS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        go.set()


def test_a_body_that_comes_too_slowly_is_not_waited_for(assistant):
    config = ServerConfig(MODEL, border=BorderConfig(body_seconds=0.2))
    head = ("POST /v1/tokenize HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 9", "", "{")
    with (
        running(config, Engine(assistant)) as (url, _),
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), SECONDS) as one,
    ):
        one.sendall("\r\n".join(head).encode())
        assert b" 408 " in one.recv(100)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://LOCALHOST:3000"}, 200),
        ({"Host": "models.example:8000", "Origin": "https://models.example"}, 200),
        ({"Host": "evil.example:8000"}, 403),  # a name that its owner lets point at this machine
        ({"Host": "[bad"}, 403),
        ({"Origin": "https://evil.example"}, 403),  # a page that asks without seeing the answer
        ({"Origin": "null"}, 403),
    ],
)
def test_a_server_without_a_key_is_asked_by_its_own_names(local, headers, status):
    answer = httpx.get(f"{local}/v1/models", headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"].startswith(list(headers)[-1])


@pytest.fixture(scope="module")
def local(assistant):
    hosts = serve.names("127.0.0.1", "models.example, other.example")
    with running(ServerConfig(MODEL, border=BorderConfig(hosts=hosts)), Engine(assistant)) as (url, _):
        yield url


def test_who_listens_to_other_machines_is_asked_by_any_name_unless_told():
    assert serve.names("0.0.0.0", None) is None and serve.names("192.168.1.5", None) is None
    assert serve.names("127.0.0.2", None) == {"127.0.0.1", "127.0.0.2", "::1", "localhost"}
    assert serve.names("LocalHost", None) == serve.names("::1", None) == set(serve.LOCAL)
    for wrong in ("models.example:443", "https://models.example"):
        with pytest.raises(UserError, match=f"--hosts {wrong}: give names alone"):
            serve.names("127.0.0.1", wrong)
    assert serve.names("0.0.0.0", "Models.example") >= {"models.example", "localhost"}


@pytest.mark.parametrize("port", ["70000", "-5"])
def test_a_port_that_cannot_be_had_is_said(capsys, port):
    assert main(["serve", "--port", port]) == 2
    assert f"--port {port}" in capsys.readouterr().err


def test_what_serve_needs_is_said(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "needs uvicorn: pip install 'dualtoken[serve]'" in capsys.readouterr().err


def test_pictures_that_fill_the_context_end_the_reply_by_length():
    engine = Engine(Assistant(*lively(context=64)))
    script(engine.model, [engine.model.config.draw_start_id] * 17)
    with running(ServerConfig(MODEL), engine) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        extra = {"modalities": ["text", "image"], "max_images": 16}
        (choice,) = chat(client, "tell", max_tokens=None, extra_body=extra).choices
    assert choice.finish_reason == "length" and 1 < len(choice.message.images) < 11


def test_with_a_key_only_health_is_open(assistant):
    config = ServerConfig(MODEL, border=BorderConfig(api_key="secret-é"))
    with running(config, Engine(assistant)) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            chat(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))
        headers = {"Authorization": "Bearer secret-é".encode()}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_a_failure_tells_the_log_and_not_the_client(assistant, caplog):
    engine = Engine(assistant)
    engine.run = lambda jobs: 1 / 0
    with running(ServerConfig(MODEL), engine) as (url, _):
        answer = post(url)
        assert answer.status_code == 500 and "division" not in answer.text and "Traceback" not in answer.text
        assert httpx.get(f"{url}/health").status_code == 200
    assert "ZeroDivisionError" in caplog.text


def test_rows_that_leave_do_not_change_others():
    """Pixel values of one job in a batch of two, one of which left midway."""
    from dualtoken.app.batching import Job
    from dualtoken.app.engine import Drawing

    engine = Engine(Assistant(*lively()))
    jobs = [Job("draw", DrawConfig(), Drawing("a star", seed)) for seed in (1, 2)]
    jobs[1].leave()
    with torch.no_grad():
        both, (alone,) = engine.run(jobs), engine.run(jobs[:1])
    assert alike(both[0], alone) and not np.array_equal(both[0], both[1])
