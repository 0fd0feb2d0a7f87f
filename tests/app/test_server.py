"""The server as OpenAI's own client meets it."""
# ruff: noqa: E402 (what is missing is found out first)

import asyncio
import json

import httpx
import pytest

for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "openai"):
    pytest.importorskip(name)

import openai

from dualtoken.app.batching import BatchConfig
from dualtoken.app.http_border import BorderConfig
from dualtoken.app.http_pictures import PictureLimits
from dualtoken.app.http_service import ServerConfig
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant, user
from tests.app.serving import MODEL, SECONDS, alike, chat, data_url, opened, png, running
from tests.generation.lively import lively
from tests.mllm.test_assistant import script


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*lively())


@pytest.fixture(scope="module")
def server():
    config = ServerConfig(
        MODEL,
        batch=BatchConfig(max_batch=8, max_wait_ms=20, max_queue=80),
        pictures=PictureLimits(max_pixels=10_000),
        border=BorderConfig(max_bytes=200_000),
    )
    with running(config) as made:
        yield made


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def picture_part(url=None):
    return {"type": "image_url", "image_url": {"url": url or data_url()}}


def test_chat_is_the_assistants_answer(client, assistant):
    content = [picture_part(), {"type": "text", "text": "what is it ?"}]
    reply = chat(client, content)
    wanted = assistant.ask([[user(png(), "what is it ?")]], max_new_tokens=8)[0]
    assert reply.choices[0].message.content == wanted and reply.model == MODEL
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens > 4
    as_file = {"type": "file", "file": {"filename": "/etc/passwd", "file_data": data_url(png(kind="JPEG"), "jpeg")}}
    assert chat(client, [as_file, content[1]]).choices[0].message.content == wanted
    earlier = [{"role": "assistant", "content": "a star"}, {"role": "user", "content": "and ?"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}, *earlier]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices[0].message


def test_fields_that_are_null_are_as_if_they_were_not_there(server):
    address = f"{server[0]}/v1/chat/completions"
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "a star"}], "max_tokens": 3}
    plain = httpx.post(address, json=asked, timeout=SECONDS)
    null = dict.fromkeys(("stream", "modalities", "n", "stop", "temperature", "max_images", "pixel"))
    again = httpx.post(address, json=asked | null, timeout=SECONDS)
    assert again.status_code == 200 and again.json()["choices"] == plain.json()["choices"]


def test_a_stream_says_the_same_bit_by_bit(client):
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        whole = chat(client, max_tokens=12, **options)
        events = list(chat(client, max_tokens=12, stream=True, stream_options={"include_usage": True}, **options))
        pieces = [e.choices[0].delta.content for e in events if e.choices and e.choices[0].delta.content]
        assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 2
        assert events[0].choices[0].delta.role == "assistant"
        assert events[-2].choices[0].finish_reason == "length" and events[-1].usage == whole.usage


def test_sampled_words_belong_to_their_seed_in_any_batch(client, server):
    seeds = [1, 2, 3, 1, 2, 3]
    alone = [chat(client, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content for seed in seeds[:3]]
    assert len(set(alone)) == 3

    async def together():
        many = openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        return await asyncio.gather(*(chat(many, temperature=1.5, top_p=0.9, seed=seed) for seed in seeds))

    assert [reply.choices[0].message.content for reply in asyncio.run(together())] == alone * 2


def test_a_stop_text_ends_the_reply(client):
    text = chat(client, max_tokens=12).choices[0].message.content
    stop = text[4:6]
    reply = chat(client, max_tokens=12, stop=[stop])
    assert reply.choices[0].message.content == text[: text.find(stop)].rstrip()
    assert reply.choices[0].finish_reason == "stop"
    events = chat(client, max_tokens=12, stop=stop, stream=True)
    streamed = "".join(e.choices[0].delta.content or "" for e in events)
    assert streamed == reply.choices[0].message.content


def test_pictures_of_a_reply_come_with_their_place(client, server):
    _, service = server
    model, tokenizer = service.engine.model, service.engine.assistant.processor.tokenizer
    said = [*tokenizer.encode("a star"), model.config.draw_start_id, *tokenizer.encode("red"), tokenizer.eos_token_id]
    options = {"max_tokens": 30, "seed": 1, "extra_body": {"modalities": ["text", "image"], "guidance": 1.5}}
    hook = script(model, said)
    message = chat(client, "tell a story", **options).choices[0].message
    hook.remove()
    assert message.content == "a star\n\nred"
    (image,) = message.images
    assert image["offset"] == len("a star") and opened(image["image_url"]["url"]).size == (16, 16)

    hook = script(model, said)
    events = list(chat(client, "tell a story", stream=True, **options))
    hook.remove()
    assert "".join(e.choices[0].delta.content or "" for e in events) == message.content
    streamed = [e.choices[0].delta.images for e in events if getattr(e.choices[0].delta, "images", None)]
    assert streamed == [message.images]

    begun = [{"role": "user", "content": "tell a story"}, message.model_dump(), {"role": "user", "content": "go on"}]
    reply = client.chat.completions.create(model=MODEL, messages=begun, max_tokens=2)
    without = [begun[0], {"role": "assistant", "content": message.content}, begun[2]]
    shorter = client.chat.completions.create(model=MODEL, messages=without, max_tokens=2)
    assert reply.usage.prompt_tokens >= shorter.usage.prompt_tokens + 4  # the picture is seen again


def test_pictures_are_the_assistants(client, assistant):
    config = DrawConfig(guidance=2.0, pixel=DrawConfig().pixel.__class__(top_k=7))
    drawn = client.images.generate(
        model=MODEL, prompt="a red star", n=2, extra_body={"seed": 5, "guidance": 2.0, "pixel": {"top_k": 7}}
    )
    wanted = assistant.draw(["a red star"], 2, config, 5)[0]
    assert all(alike(opened(d.b64_json), w) for d, w in zip(drawn.data, wanted, strict=True))
    assert [entry.seed for entry in drawn.data] == [5, 6]
    again = client.images.generate(prompt="a red star", response_format="url", output_format="webp", size="16x16")
    assert again.data[0].url.startswith("data:image/webp;base64,") and again.data[0].seed >= 0
    edited = client.images.edit(
        model=MODEL, image=("../../x.png", png("blue")), prompt="a star", n=2,
        extra_body={"seed": 7, "pixel": {"temperature": 0.5}},
    )  # fmt: skip
    config = DrawConfig(pixel=DrawConfig().pixel.__class__(temperature=0.5))
    wanted = assistant.edit([png("blue")], ["a star"], 2, config, 7)[0]
    assert all(alike(opened(d.b64_json), w) for d, w in zip(edited.data, wanted, strict=True))
    assert not alike(opened(edited.data[0].b64_json), opened(drawn.data[0].b64_json))


def test_64_requests_at_once_none_lost_same_picture_for_a_seed(client, server):
    url, service = server
    prompts = ["a red star", "a blue circle on a red background"]
    alone = {
        (prompt, seed): client.images.generate(prompt=prompt, extra_body={"seed": seed}).data[0].b64_json
        for prompt in prompts
        for seed in range(4)
    }

    async def ask(many, number):
        prompt, seed = prompts[number % 2], number // 2 % 4
        if number % 4 == 3:
            return (await chat(many, f"number {number % 8}", max_tokens=3)).choices[0].message.content
        return (await many.images.generate(prompt=prompt, extra_body={"seed": seed})).data[0].b64_json

    async def together():
        many = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        return await asyncio.gather(*(ask(many, number) for number in range(64)))

    answers = asyncio.run(together())
    assert len(answers) == 64 and len(service.batcher.waiting) == 0
    for number, answer in enumerate(answers):
        if number % 4 == 3:
            assert answer == answers[number % 8]
        else:
            assert alike(opened(answer), opened(alone[prompts[number % 2], number // 2 % 4]))
    sizes = {s.name + str(s.labels.get("le")): s.value for m in service.metrics.rows.collect() for s in m.samples}
    assert sizes["dualtoken_batch_rows_bucket+Inf"] > sizes["dualtoken_batch_rows_bucket1.0"]  # some ran together


def test_codes_there_and_back(client, server, assistant):
    url, _ = server
    shown = [data_url(png("red")), data_url(png("blue", kind="GIF"), "gif")]
    found = httpx.post(f"{url}/v1/tokenize", json={"images": shown}).json()
    assert (found["positions"], found["depth"], found["codebook_size"]) == (4, 2, 16)
    pixels = assistant.processor.image_processor([png("red"), png("blue")])["pixel_values"]
    codes = assistant.model.vision_tokenizer.encode(pixels)
    assert [entry["pixel"] for entry in found["data"]] == codes.pixel.tolist()
    assert [entry["semantic"] for entry in found["data"]] == codes.semantic.tolist()
    sent = [{"pixel": e["pixel"], "semantic": e["semantic"]} for e in found["data"]]
    answer = httpx.post(f"{url}/v1/detokenize", json={"codes": sent, "response_format": "url"}).json()
    wanted = assistant.processor.image_processor.postprocess(assistant.model.decode_image_tokens(codes))
    assert all(alike(opened(e["url"]), w) for e, w in zip(answer["data"], wanted, strict=True))


def test_models_health_and_metrics(client, server):
    url, _ = server
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).image_size == 16
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0}
    chat(client, max_tokens=1)
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "Not Found"
    text = httpx.get(f"{url}/metrics").text
    assert 'dualtoken_requests_total{route="/v1/chat/completions",status="200"}' in text and "/nowhere" not in text
    assert "dualtoken_batch_rows_bucket" in text and "dualtoken_waiting_rows 0.0" in text


TEXT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def with_picture(url):
    return TEXT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, picture_part(url)]}]}


def damaged():
    return png(size=(50, 50))[:60]


HALF = "\ud83d"  # half of an emoji
IN_CONTENT = "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("path", "body", "param", "status"),
    [
        ("chat/completions", {"model": MODEL}, "messages", 400),
        ("chat/completions", TEXT | {"messages": []}, "messages", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "assistant", "content": "x"}]}, "messages", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0]", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": HALF}]},
         "messages[0].content[0].text", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 257}]},
         "messages[0].content", 400),
        ("chat/completions", TEXT | {"stop": HALF}, "stop[0]", 400),
        ("chat/completions", TEXT | {"model": HALF}, "model", 404),
        ("images/generations", {"prompt": HALF}, "prompt", 400),
        ("chat/completions", TEXT | {"temperature": 3}, "temperature", 400),
        ("chat/completions", TEXT | {"n": 2}, "n", 400),
        ("chat/completions", TEXT | {"tools": []}, "tools", 400),
        ("chat/completions", TEXT | {"seed": -1}, "seed", 400),
        ("chat/completions", TEXT | {"max_tokens": 1000}, "max_tokens", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": "long " * 200}]}, "messages", 400),
        ("chat/completions", TEXT | {"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", 400),
        ("chat/completions", TEXT | {"model": "gpt-4o"}, "model", 404),
        ("chat/completions", with_picture("/etc/passwd"), IN_CONTENT, 400),
        ("chat/completions", with_picture("file:///etc/passwd"), IN_CONTENT, 400),
        ("chat/completions", with_picture("http://127.0.0.1:1/x.png"), IN_CONTENT, 400),
        ("chat/completions", with_picture("data:image/png;base64,%%%"), IN_CONTENT, 400),
        ("chat/completions", with_picture("data:image/png,abc"), IN_CONTENT, 400),
        ("chat/completions", with_picture(data_url(b"no picture")), IN_CONTENT, 400),
        ("chat/completions", with_picture(data_url(damaged())), IN_CONTENT, 400),
        ("chat/completions", with_picture(data_url(png(kind="TIFF"))), IN_CONTENT, 400),  # not let in
        ("chat/completions", with_picture(data_url(png(size=(4000, 3000)))), IN_CONTENT, 400),  # a small file
        ("images/generations", {"prompt": ""}, "prompt", 400),
        ("images/generations", {"prompt": "x", "size": "1024x1024"}, "size", 400),
        ("images/generations", {"prompt": "x", "n": 17}, "n", 400),
        ("images/generations", {"prompt": "x", "stream": True}, "stream", 400),
        ("images/generations", {"prompt": "x", "pixel": {"top_p": 0}}, "pixel.top_p", 400),
        ("images/generations", {"prompt": "long " * 200}, "prompt", 400),
        ("images/generations", {"prompt": "x", "response_format": "file"}, "response_format", 400),
        ("tokenize", {"images": ["x.png"]}, "images[0]", 400),
        ("tokenize", {"images": []}, "images", 400),
        ("detokenize", {"codes": [{"pixel": [[1, 2]]}]}, "codes[0].pixel", 400),
        ("detokenize", {"codes": [{"pixel": [[0, 16]] * 4}]}, "codes[0].pixel", 400),
        ("detokenize", {"codes": [{"pixel": [[0, "a"]] * 4}]}, "codes[0].pixel[0][1]", 400),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(server, path, body, param, status):
    sent = json.dumps(body).encode()  # ASCII, so that half characters come through
    answer = httpx.post(f"{server[0]}/v1/{path}", content=sent, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert param.split("[")[0].split(".")[-1] in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({"prompt": "x"}, {}, "image"),
        ({}, {"image": png()}, "prompt"),
        ({"prompt": "x"}, {"image": b"no picture"}, "image"),
        ({"prompt": "x"}, {"image": png(), "mask": png()}, "mask"),
        ({"prompt": "x"}, [("image[]", png()), ("image[]", png())], "image"),
        ({"prompt": "x", "n": "many"}, {"image": png()}, "n"),
        ({"prompt": "x", "pixel[top_k]": "-1"}, {"image": png()}, "pixel.top_k"),
        ({"prompt": "x", "pixel": "3", "pixel[top_k]": "2"}, {"image": png()}, "pixel[top_k]"),
        ({"prompt": "x", "pixel[top_k]": "2", "pixel": "3"}, {"image": png()}, "pixel"),
        ({"prompt": "x", "image": "/etc/passwd"}, {"other": ("", b"")}, None),
    ],
)
def test_bad_forms_name_the_field(server, data, files, param):
    answer = httpx.post(f"{server[0]}/v1/images/edits", data=data, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in (param, "image")


def test_bodies_that_are_none(server):
    url = f"{server[0]}/v1/chat/completions"
    for content in (b"", b"{", b"[" * 5000, b'{"model": NaN}', b"\xff"):
        answer = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "error" in answer.json()
    large = httpx.post(url, content=b" " * 200_001, headers={"content-type": "application/json"})
    assert large.status_code == 413 and "200,000 bytes" in large.json()["error"]["message"]

    def chunks():
        for _ in range(30):
            yield b" " * 10_000

    assert httpx.post(url, content=chunks(), headers={"content-type": "application/json"}).status_code == 413
    assert httpx.get(url).status_code == 405
