"""Whatever a client sends: no 5xx, no hang, and an answer as the OpenAPI document describes it.

Cases come from the gateway's own document, valid ones and broken ones. The backend behind it fails a request that no
engine should ever see, and so turns a hole in the validation into a 500.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
)
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from serve.core.request import GenerateRequest, TokenDelta
from serve.ingress.api import GatewayApp, make_app
from serve.ingress.models import load_model
from serve.ingress.openai import ChatCompletionRequest, CompletionRequest
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.settings import GatewaySettings
from tests.unit.ingress.asgi import Connection, post
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, say
from tests.unit.ingress.tiny_model import CONTEXT_TOKENS, write_model
from tests.unit.router.boards import make_board

VOCAB_SIZE = 512
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
GENERATING = ["/v1/chat/completions", "/v1/completions"]
HEADERS = [
    b"content-type",
    b"content-length",
    b"x-request-id",
    b"x-raytrt-timing",
    b"x-raytrt-explain",
    b"x-session-id",
    b"x-tenant-id",
    b"transfer-encoding",
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def assert_an_engine_can_take(request: GenerateRequest) -> None:
    sampling = request.sampling
    prompt = request.prompt_array()
    assert 1 <= len(prompt) <= CONTEXT_TOKENS - sampling.max_tokens
    assert prompt.max() < VOCAB_SIZE
    assert sampling.max_tokens >= sampling.min_tokens >= 0
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 <= sampling.top_k < 2**31
    assert 0 < sampling.repetition_penalty <= 100
    assert abs(sampling.presence_penalty) <= 2
    assert abs(sampling.frequency_penalty) <= 2
    assert sampling.seed is None or 0 <= sampling.seed < 2**63
    assert all(0 <= token < VOCAB_SIZE and abs(bias) <= 100 for token, bias in sampling.logit_bias.items())
    assert all(0 <= token < VOCAB_SIZE for token in sampling.stop_token_ids)
    assert sampling.logprobs is None or 0 <= sampling.logprobs <= 20
    assert sampling.prompt_logprobs is None or 0 <= sampling.prompt_logprobs <= 20


@cache
def gateway() -> GatewayApp:
    with TemporaryDirectory() as directory:
        model = load_model("tiny", write_model(Path(directory)))
    speak = say(tokens_of(model, "Hello there, 世界 😀!"), per_delta=2)

    async def script(request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        assert_an_engine_can_take(request)
        async for delta in speak(request):
            yield delta

    board, _, _ = make_board("a", "b")
    backend = FakeBackend(script, desk=RoutingDesk({"tiny": board}))
    return make_app([model], backend, lambda: GatewaySettings(max_sequences_per_request=4))


@cache
def operations() -> dict[str, Any]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", gateway())
    return {f"{result.ok().method.upper()} {result.ok().path}": result.ok() for result in schema.get_all_operations()}


def check_bodies(operation: str, mode: GenerationMode, data: st.DataObject) -> None:
    case = data.draw(operations()[f"POST {operation}"].as_strategy(generation_mode=mode))
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    case.validate_response(case.call(), checks=checks)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", GENERATING)
@given(data=st.data())
@settings(FUZZ, max_examples=100)
def test_bodies_that_generate(path: str, mode: GenerationMode, data: st.DataObject) -> None:
    check_bodies(path, mode, data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/debug/route"])
@given(data=st.data())
@settings(FUZZ, max_examples=30)
def test_bodies_that_generate_nothing(path: str, mode: GenerationMode, data: st.DataObject) -> None:
    check_bodies(path, mode, data)


@pytest.mark.parametrize(
    "operation",
    [
        f"GET {path}"
        for path in (
            "/v1/models",
            "/v1/models/{model}",
            "/health",
            "/ready",
            "/version",
            "/metrics",
            "/debug/requests/{request}",
        )
    ],
)
@given(data=st.data())
@settings(FUZZ, max_examples=10)
def test_gets(operation: str, data: st.DataObject) -> None:
    case = data.draw(operations()[operation].as_strategy())
    case.validate_response(case.call(), checks=CHECKS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hi"}),
}


@pytest.mark.parametrize("path", GENERATING)
@given(data=st.data())
@settings(FUZZ, max_examples=150)
def test_any_value_in_any_field(path: str, data: st.DataObject) -> None:
    kind, least = FIELDS[path]
    names = data.draw(st.lists(st.sampled_from(kind.__struct_fields__), min_size=1, max_size=3))
    body = {"model": "tiny"} | least | {name: data.draw(JSON, label=name) for name in names}
    answer = asyncio.run(post(gateway(), path, json.dumps(body).encode()))
    assert answer.status in (200, 400, 404)


@given(start=st.binary(max_size=30), headers=st.dictionaries(st.sampled_from(HEADERS), st.binary(max_size=20)))
@settings(FUZZ, max_examples=150)
def test_any_bytes(start: bytes, headers: dict[bytes, bytes]) -> None:
    connection = Connection("/v1/completions", [start, b'{"model":"tiny","prompt":"Hi"}'])
    scope_headers = [(b"content-type", b"application/json"), *headers.items()]
    asyncio.run(connection.run(gateway(), scope_headers))
    assert connection.status in (200, 400, 413, 415)
    assert len(connection.answer_headers["x-request-id"]) <= 128


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"model":"tiny","prompt":"Hi","metadata":' + b'{"a":' * 100_000,
        b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"audio":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
        b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"chat_template_kwargs":{"a":'
        + b"[" * 900
        + b"1.0"
        + b"]" * 900
        + b'},"n":1.0}',
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"\xff"}',
        b"\xff\xfe{}",
        b'{"model":"tiny","prompt":"Hi","temperature":NaN}',
        b'{"model":"tiny","prompt":"Hi","temperature":1e999}',
        b'{"model":"tiny","prompt":"Hi","n":' + b"9" * 5000 + b"}",
        b'{"model":"tiny","prompt":[-1]}',
        b'{"model":"tiny","prompt":[512]}',
        b'{"model":"tiny","prompt":[4294967296]}',
        b'{"model":"tiny","prompt":[]}',
        b'{"model":"tiny","prompt":[[]]}',
        b'{"model":"tiny","prompt":"Hi","stop":[""]}',
        b'{"model":"tiny","prompt":"Hi","logit_bias":{"\xd9\xa1":1}}',
        b'{"model":"tiny","prompt":"Hi","logit_bias":{"-1":1}}',
    ],
)
async def test_known_poison_is_a_400(body: bytes) -> None:
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    answer = await post(gateway(), path, body)
    if answer.status == 200:  # nesting that Python bears
        assert b"chat_template_kwargs" in body
        return
    assert answer.status == 400
    error = json.loads(answer.answer)["error"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"]


async def test_a_null_byte_is_text_like_any_other() -> None:
    answer = await post(gateway(), "/v1/completions", {"model": "tiny", "prompt": "a\0b", "echo": True})
    assert json.loads(answer.answer)["choices"][0]["text"].startswith("a\0b")
