"""Streams: framing, order, errors in the middle, clients that go away or are slow."""

import asyncio
import dataclasses
import gc
import json
from collections.abc import AsyncGenerator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta
from serve.errors import EngineDead, Overloaded
from serve.ingress.api import GatewayApp, make_app
from serve.ingress.exchange import Exchange
from serve.ingress.models import ServedModel, load_model
from serve.ingress.settings import GatewaySettings
from tests.unit.ingress.asgi import Connection, post
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, fail, say, say_for_ever, silent

TEXT = "Hello there, 世界 😀!"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "stream": True, "max_tokens": 64}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat_text(events: list[Any], index: int = 0) -> str:
    choices = [
        choice for event in events if event != "[DONE]" for choice in event["choices"] if choice["index"] == index
    ]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def live_exchanges() -> int:
    gc.collect()
    return sum(type(thing) is Exchange for thing in gc.get_objects())


async def until(condition: Any) -> None:
    """Let other tasks run until something holds."""
    while not condition():  # noqa: ASYNC110  # of any kind, of any object
        await asyncio.sleep(0)


async def test_a_chat_stream_is_framed_as_openai_does(app: GatewayApp) -> None:
    connection = await post(app, CHATS, CHAT)
    assert connection.status == 200
    assert connection.answer_headers["content-type"].startswith("text/event-stream")
    assert connection.answer_headers["cache-control"] == "no-cache"
    assert connection.answer_headers["x-accel-buffering"] == "no"
    *chunks, done = connection.events
    assert done == "[DONE]"
    assert chat_text(chunks) == TEXT
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk and "raytrt" not in chunk for chunk in chunks)
    assert [message.get("more_body") for message in connection.messages[1:]][-1] is False


async def test_usage_is_the_last_chunk_and_null_before(app: GatewayApp, backend: FakeBackend) -> None:
    *chunks, usage, done = (await post(app, CHATS, CHAT | {"stream_options": {"include_usage": True}})).events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == backend.requests[0].prompt_tokens
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_n_answers_share_one_stream(app: GatewayApp) -> None:
    events = (await post(app, CHATS, CHAT | {"n": 3})).events
    assert [chat_text(events, index) for index in range(3)] == [TEXT] * 3
    ended = [event["choices"][0]["index"] for event in events[:-1] if event["choices"][0]["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]
    assert events.count("[DONE]") == 1


async def test_a_stop_string_over_token_borders_is_never_shown(
    app: GatewayApp, backend: FakeBackend, model: ServedModel
) -> None:
    backend.script = say(tokens_of(model, "hello wonderful world"))
    events = (await post(app, CHATS, CHAT | {"stop": ["wonderful", "x"]})).events
    assert chat_text(events) == "hello "
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert backend.cancelled == [backend.requests[0].request_id]


async def test_an_engine_that_ends_by_itself_is_not_cancelled(app: GatewayApp, backend: FakeBackend) -> None:
    for stream in (True, False):
        await post(app, CHATS, CHAT | {"stream": stream})
    assert backend.cancelled == []
    assert backend.running == 0


async def test_timing_is_added_when_asked_for(app: GatewayApp, backend: FakeBackend, model: ServedModel) -> None:
    backend.script = say(tokens_of(model, "one two three"), per_delta=2)
    for path, body in ((CHATS, CHAT), (COMPLETIONS, COMPLETION)):
        *chunks, _ = (await post(app, path, body, x_raytrt_timing="1")).events
        timings = [chunk["raytrt"] for chunk in chunks]
        assert [timing["emitted_s"] for timing in timings] == [1000.0 + number for number in range(len(chunks))]
        assert sum(timing["tokens"] for timing in timings) == len(tokens_of(model, "one two three"))
        assert (timings[-1]["queue_s"], timings[-1]["prefill_s"]) == (0.25, 0.5)
        assert all("queue_s" not in timing for timing in timings[:-1])


@pytest.mark.parametrize("error", [EngineDead("rank 1"), Overloaded("full"), RuntimeError("secret")])
async def test_an_error_in_mid_stream_is_the_last_event(
    app: GatewayApp, backend: FakeBackend, model: ServedModel, error: Exception
) -> None:
    backend.script = fail(error, after=tokens_of(model, "Hello"))
    connection = await post(app, CHATS, CHAT)
    assert connection.status == 200
    *chunks, last = connection.events
    assert chat_text(chunks) == "Hello"
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert connection.messages[-1]["more_body"] is False


async def test_a_sequence_that_ends_without_reason_is_an_error(app: GatewayApp, backend: FakeBackend) -> None:
    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((10,), prefill=PrefillInfo())

    backend.script = script
    assert (await post(app, CHATS, CHAT | {"stream": False})).status == 503
    assert "error" in (await post(app, CHATS, CHAT)).events[-1]


async def test_a_sequence_that_the_engine_cancels_is_an_error(app: GatewayApp, backend: FakeBackend) -> None:
    backend.script = say([10, 11], finish=FinishReason.CANCELLED)
    assert (await post(app, CHATS, CHAT | {"stream": False})).status == 503
    assert "error" in (await post(app, CHATS, CHAT)).events[-1]


@pytest.mark.parametrize("stream", [True, False])
async def test_one_of_n_that_fails_cancels_the_others(app: GatewayApp, backend: FakeBackend, stream: bool) -> None:
    backend.script = [say_for_ever(10), fail(EngineDead("rank 0"), after=[10, 10]), silent()]
    connection = await post(app, CHATS, CHAT | {"n": 3, "stream": stream})
    if stream:
        assert "error" in connection.events[-1]
    else:
        assert connection.status == 503
    assert backend.running == 0
    assert len(backend.cancelled) == 2


@pytest.mark.parametrize("script", [say_for_ever(10), silent()])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_sequences(
    app: GatewayApp, backend: FakeBackend, script: Any, n: int, stream: bool
) -> None:
    backend.script = script
    connection = Connection(CHATS, [json.dumps(CHAT | {"n": n, "stream": stream}).encode()])
    task = asyncio.create_task(connection.run(app))
    await until(lambda: backend.running == n)
    connection.go_away()
    await task
    assert backend.running == 0
    assert len(backend.cancelled) == n
    assert not any(message.get("more_body") is False for message in connection.messages)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_server_that_cancels_the_request_cancels_its_sequences(
    app: GatewayApp, backend: FakeBackend, n: int
) -> None:
    backend.script = say_for_ever(10)
    task = asyncio.create_task(post(app, CHATS, CHAT | {"n": n}))
    await until(lambda: backend.running == n)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.running == 0
    assert len(backend.cancelled) == n


async def test_a_send_that_fails_cancels_the_sequence(app: GatewayApp, backend: FakeBackend) -> None:
    backend.script = say_for_ever(10)

    def break_pipe(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    connection = Connection(CHATS, [json.dumps(CHAT).encode()], on_message=break_pipe)
    await connection.run(app)
    assert backend.running == 0


async def test_a_client_that_goes_away_while_it_sends_asks_for_nothing(app: GatewayApp, backend: FakeBackend) -> None:
    connection = Connection(CHATS, [b"{", b"never sent"])
    connection.drop_after(1)
    await connection.run(app)
    assert connection.messages == []
    assert backend.requests == []


async def test_the_head_is_sent_with_the_first_delta_even_if_it_has_no_text(
    app: GatewayApp, backend: FakeBackend
) -> None:
    go_on = asyncio.Event()

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta(prefill=PrefillInfo())
        await go_on.wait()
        yield TokenDelta((10,), finish_reason=FinishReason.LENGTH)

    backend.script = script
    connection = Connection(CHATS, [json.dumps(CHAT).encode()])
    task = asyncio.create_task(connection.run(app))
    await until(lambda: connection.messages)
    assert connection.status == 200
    go_on.set()
    await task
    assert connection.events[-1] == "[DONE]"


async def test_a_slow_client_gets_all_of_n_answers_in_few_chunks(
    app: GatewayApp, backend: FakeBackend, model: ServedModel
) -> None:
    text = "one two three four " * 20
    backend.script = say(tokens_of(model, text))
    connection = Connection(CHATS, [json.dumps(CHAT | {"n": 2}).encode()])
    connection.writable.clear()
    task = asyncio.create_task(connection.run(app))
    await until(lambda: len(backend.requests) == 2 and backend.running == 0)
    connection.writable.set()
    await task
    assert [chat_text(connection.events, index) for index in range(2)] == [text] * 2
    assert len(connection.events) < 10


async def test_many_streams_leave_nothing_behind(models: list[ServedModel], model: ServedModel) -> None:
    before = live_exchanges()
    backend = FakeBackend(say(tokens_of(model, TEXT)))
    app = make_app(models, backend, GatewaySettings)
    bodies = [CHAT | {"n": 1 + number % 3, "stop": ["zzz"] * (number % 2)} for number in range(200)]
    answers = await asyncio.gather(*[post(app, CHATS, body) for body in bodies])
    for body, answer in zip(bodies, answers, strict=True):
        assert [chat_text(answer.events, index) for index in range(body["n"])] == [TEXT] * body["n"]
    del answers
    await asyncio.sleep(0)
    assert backend.running == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert live_exchanges() == before


async def test_a_long_prompt_does_not_stop_the_loop(model_dir: Path, model: ServedModel) -> None:
    """While a prompt is tokenized, the loop stands still for a small part of that time only, whatever the machine."""
    backend = FakeBackend(say(tokens_of(model, TEXT)))
    large = dataclasses.replace(load_model("long", model_dir), context_tokens=10**6)
    app = make_app([large], backend, GatewaySettings)
    loop = asyncio.get_running_loop()
    body = COMPLETION | {"model": "long", "prompt": "The quick brown fox jumps over the lazy dog again. " * 10_000}
    request = asyncio.create_task(post(app, COMPLETIONS, body))
    await asyncio.sleep(0)  # parsed, and given to a thread
    started_s = last_s = loop.time()
    longest_s = 0.0
    while not backend.requests:
        await asyncio.sleep(0)
        longest_s, last_s = max(longest_s, loop.time() - last_s), loop.time()
    assert (await request).status == 200
    assert backend.requests[0].prompt_tokens > 100_000
    assert longest_s < (last_s - started_s) / 2
