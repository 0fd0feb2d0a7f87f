"""What the server does where it is too much, too late, or goes wrong."""
# ruff: noqa: E402 (what is missing is found out first)

import asyncio
import threading

import httpx
import numpy as np
import pytest
import torch

for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "openai"):
    pytest.importorskip(name)

import openai

from dualtoken.app.batching import BatchConfig
from dualtoken.app.engine import Engine
from dualtoken.app.http_border import BorderConfig
from dualtoken.app.http_service import ServerConfig
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant
from tests.app.serving import MODEL, SECONDS, alike, chat, eventually, running
from tests.generation.lively import lively


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
