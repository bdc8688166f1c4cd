"""The official client against the gateway."""

from typing import Any

import openai
import pytest

from serve.ingress.api import GatewayApp
from serve.ingress.models import ServedModel
from tests.unit.ingress.conftest import client_of, tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, fail, say

TEXT = "Hello there, 世界 😀!"


@pytest.fixture
def api(app: GatewayApp) -> openai.AsyncOpenAI:
    http_client: Any = client_of(app)  # which httpx the library is typed for depends on its release
    return openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=http_client, max_retries=0)


async def test_chat_completion(api: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    answer = await api.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == backend.requests[0].prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_chat_completion(api: openai.AsyncOpenAI, model: ServedModel) -> None:
    stream = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens_of(model, TEXT))


async def test_completion_with_n_and_a_batch(api: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    answer = await api.completions.create(model="tiny", prompt=["one", "two"], n=2, seed=7, max_tokens=64)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {TEXT}
    assert [request.sampling.seed for request in backend.requests] == [7, 8, 7, 8]
    assert len({request.request_id for request in backend.requests}) == 4


async def test_streamed_completion(api: openai.AsyncOpenAI) -> None:
    stream = await api.completions.create(model="tiny", prompt="one", stream=True, max_tokens=64)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_logprobs(api: openai.AsyncOpenAI, model: ServedModel) -> None:
    answer = await api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == TEXT
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


async def test_error_in_the_stream_is_raised(api: openai.AsyncOpenAI, backend: FakeBackend, model: ServedModel) -> None:
    backend.script = fail(RuntimeError("secret detail"), after=tokens_of(model, "Hello there"))
    stream = await api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True)
    seen = ""

    async def read() -> None:
        nonlocal seen
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert "secret" not in str(caught.value)
    assert seen == "Hello there"


async def test_unknown_model_is_not_found(api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await api.chat.completions.create(model="nope", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_models(api: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in await api.models.list()]
    assert listed == ["tiny", "org/tiny-2"]
    assert (await api.models.retrieve("org/tiny-2")).id == "org/tiny-2"


async def test_stop_string_cancels_the_sequence(
    api: openai.AsyncOpenAI, backend: FakeBackend, model: ServedModel
) -> None:
    backend.script = say(tokens_of(model, "one two three four five"), per_delta=3)
    answer = await api.completions.create(model="tiny", prompt="count", stop=["four"], max_tokens=64)
    assert answer.choices[0].text == "one two three "
    assert answer.choices[0].finish_reason == "stop"
    assert backend.running == 0
