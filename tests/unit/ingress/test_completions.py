"""POST /v1/completions beyond what chat has: batches, token ids, echo, scoring, its own form of logprobs."""

import json
from typing import Any

import httpx
import pytest

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta, TokenLogprob
from serve.ingress.models import ServedModel
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, say

TEXT = "Hello there, 世界 😀!"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello there", "max_tokens": 64}


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post("/v1/completions", json=BODY | fields | {"stream": True})
    *chunks, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def prompt_of(request: GenerateRequest) -> list[int]:
    ids: list[int] = request.prompt_array().tolist()
    return ids


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", [["one"]]),
        (["one", "two"], [["one"], ["two"]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_every_form_of_prompt(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, prompt: Any, expected: list[list[Any]]
) -> None:
    answer = await complete(client, prompt=prompt)
    wanted = [[1, *tokens_of(model, item[0])] if isinstance(item[0], str) else item for item in expected]
    assert [prompt_of(request) for request in backend.requests] == wanted
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(wanted)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))


async def test_mixed_prompts_are_refused(client: httpx.AsyncClient) -> None:
    for prompt in (["one", 1], [1, [2]], ["one", [1]]):
        answer = await client.post("/v1/completions", json=BODY | {"prompt": prompt})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"


async def test_a_bad_prompt_of_a_batch_is_named(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    answer = await client.post("/v1/completions", json=BODY | {"prompt": [[1], [512]]})
    assert answer.json()["error"]["param"] == "prompt[1]"
    assert backend.requests == []


async def test_an_empty_prompt_needs_a_first_token(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, prompt="")
    assert prompt_of(backend.requests[0]) == [1]
    answer = await client.post("/v1/completions", json=BODY | {"prompt": "", "add_special_tokens": False})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_the_default_limit_is_sixteen_tokens_or_what_is_left(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    await complete(client, max_tokens=None)
    await complete(client, max_tokens=None, prompt=[5] * 510)
    assert [request.sampling.max_tokens for request in backend.requests] == [16, 2]


async def test_prompts_count_once_and_cached_is_what_all_found(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel
) -> None:
    tokens = tokens_of(model, "one")
    backend.script = [say(tokens, cached_tokens=cached) for cached in (0, 2, 2, 3)]
    usage = (await complete(client, prompt=[[5, 6, 7, 8], [5, 6, 7]], n=2))["usage"]
    assert usage["prompt_tokens"] == 7
    assert usage["completion_tokens"] == 4 * len(tokens)
    assert usage["total_tokens"] == 7 + 4 * len(tokens)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_best_of_is_n_or_nothing(client: httpx.AsyncClient) -> None:
    assert len((await complete(client, n=2, best_of=2))["choices"]) == 2
    answer = await client.post("/v1/completions", json=BODY | {"n": 2, "best_of": 3})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "best_of"


async def test_a_suffix_is_refused_unless_empty(client: httpx.AsyncClient) -> None:
    await complete(client, suffix="")
    assert (await client.post("/v1/completions", json=BODY | {"suffix": "x"})).status_code == 400


async def test_logprobs_are_lists_of_one_length_over_the_text(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, logprobs=2))["choices"][0]
    logprobs = choice["logprobs"]
    assert len({len(entries) for entries in logprobs.values()}) == 1
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])


async def test_echo_puts_the_prompt_first(client: httpx.AsyncClient) -> None:
    assert (await complete(client, echo=True))["choices"][0]["text"] == "hello there" + TEXT
    chunks = await streamed(client, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello there" + TEXT


async def test_echo_of_token_ids_is_their_text(client: httpx.AsyncClient, model: ServedModel) -> None:
    answer = await complete(client, echo=True, prompt=[1, *tokens_of(model, "hello 世界")])
    assert answer["choices"][0]["text"] == "hello 世界" + TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_prompt_and_answer(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, stream: bool
) -> None:
    prompt_ids, answer_ids = [1, *tokens_of(model, "hello there")], tokens_of(model, TEXT)
    if stream:
        parts = [chunk["choices"][0] for chunk in await streamed(client, echo=True, logprobs=1)]
        text = "".join(part["text"] for part in parts)
        logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
        for part in parts:
            for name, values in (part["logprobs"] or {}).items():
                logprobs[name] += values
    else:
        choice = (await complete(client, echo=True, logprobs=1))["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert backend.requests[0].sampling.prompt_logprobs == 1
    assert logprobs["token_logprobs"] == [None, *(-token / 1000 for token in [*prompt_ids[1:], *answer_ids])]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["tokens"][0] == "<|bos|>"
    assert len({len(values) for values in logprobs.values()}) == 1
    shown = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]
    assert all(text[offset:].startswith(token) for token, offset in shown if not token.startswith("bytes:"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_scored_without_generating(
    client: httpx.AsyncClient, backend: FakeBackend, stream: bool
) -> None:
    fields: dict[str, Any] = {"prompt": [1, 20, 30], "max_tokens": 0, "echo": True, "logprobs": 0}
    body = (await streamed(client, **fields))[-1] if stream else await complete(client, **fields)
    choice = body["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.02, -0.03]
    assert choice["finish_reason"] == "length"
    assert backend.requests[0].sampling.max_tokens == 0


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -1,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": 3, "6": -100},
        "min_tokens": 2,
        "stop_token_ids": [9, 4],
        "logprobs": 3,
        "cache_salt": "tenant",
    }
    await complete(client, **fields, n=2)
    first, second = backend.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 1, -1)
    assert sampling.logit_bias == {5: 3, 6: -100}
    assert (sampling.min_tokens, sampling.logprobs, sampling.prompt_logprobs) == (2, 3, None)
    assert sampling.stop_token_ids == (2, 4, 9)
    assert (sampling.seed, second.sampling.seed) == (2**63 - 1, 0)
    assert first.cache_salt == "tenant"


async def test_defaults_are_openais(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client)
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0, None)
    assert sampling.stop_token_ids == (2, 4)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


async def test_extremes_mean_what_engines_understand(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, top_p=0, top_k=-1, ignore_eos=True)
    sampling = backend.requests[0].sampling
    assert (sampling.top_p, sampling.top_k, sampling.stop_token_ids) == (1.0, 1, ())
    await complete(client, top_k=-1)
    assert backend.requests[1].sampling.top_k == 0


async def test_impossible_tokens_have_a_finite_logprob(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel
) -> None:
    async def script(request: GenerateRequest) -> Any:
        entry = TokenLogprob(20, float("-inf"), ((20, float("nan")),))
        yield TokenDelta((20,), FinishReason.LENGTH, None, (entry,), PrefillInfo())

    backend.script = script
    logprobs = (await complete(client, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert list(logprobs["top_logprobs"][0].values()) == [-9999.0]
