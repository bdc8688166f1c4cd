"""What holds for every endpoint: routes, headers, limits, errors, metrics."""

import json
import logging
from typing import Any

import httpx
import pytest

from serve.errors import EngineDead, Overloaded, RequestError, StreamLost
from serve.ingress.api import GatewayApp, make_app
from serve.ingress.models import ServedModel
from serve.ingress.settings import GatewaySettings
from tests.unit.ingress.asgi import Connection, post
from tests.unit.ingress.conftest import client_of, tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, fail, say, silent

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_health_and_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok", "fallbacks": {}}
    assert set((await client.get("/version")).json()) == {"version"}


async def test_ready_needs_a_replica_of_every_model(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await client.get("/ready")).status_code == 200
    backend.ready["org/tiny-2"] = 0
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert [model["ready_replicas"] for model in answer.json()["models"]] == [1, 0]
    del backend.ready["org/tiny-2"]
    assert (await client.get("/ready")).status_code == 503


async def test_a_model_id_may_contain_a_slash(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/org/tiny-2")).json()["id"] == "org/tiny-2"
    assert (await client.get("/v1/models/org%2Ftiny-2")).json()["id"] == "org/tiny-2"
    answer = await client.get("/v1/models/org/other")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", PATH, 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/tiny", 405),
    ],
)
async def test_unknown_routes_have_the_same_form_of_error(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) == (status == 405)


async def test_head_has_headers_only(client: httpx.AsyncClient) -> None:
    answer = await client.head("/health")
    assert answer.status_code == 200
    assert answer.content == b""


async def test_root_path_of_a_mounted_application_is_ignored(app: GatewayApp) -> None:
    transport = httpx.ASGITransport(app=app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_sane_request_id_comes_back(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=CHAT, headers={"x-request-id": "trace-1/a"})
    assert answer.headers["x-request-id"] == "trace-1/a"
    assert answer.headers["x-response-time"].endswith("ms")


@pytest.mark.parametrize("bad", ["a" * 129, "has space", "new\nline", "é"])
async def test_another_request_id_is_replaced(app: GatewayApp, bad: str) -> None:
    connection = await Connection("/nothing", headers={"x-request-id": bad}).run(app)
    assert connection.status == 404
    assert connection.answer_headers["x-request-id"].isalnum()


async def test_sequences_have_ids_of_their_own(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for _ in range(2):
        await client.post(PATH, json=CHAT | {"n": 2}, headers={"x-request-id": "same"})
    assert len({request.request_id for request in backend.requests}) == 4


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "jsonp"])
async def test_another_content_type_is_refused(app: GatewayApp, content_type: str) -> None:
    assert (await post(app, PATH, CHAT, content_type=content_type)).status == 415


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "application/vnd.api+json", "APPLICATION/JSON", ""]
)
async def test_json_is_recognised(app: GatewayApp, content_type: str) -> None:
    assert (await post(app, PATH, CHAT, content_type=content_type)).status == 200


async def test_a_long_body_is_refused_before_it_is_read(models: list[ServedModel], backend: FakeBackend) -> None:
    app = make_app(models, backend, lambda: GatewaySettings(max_body_bytes=100))
    connection = Connection(PATH, [b"x" * 60, b"x" * 60, b"x" * 60], {"content-length": "180"})
    await connection.run(app)
    assert connection.status == 413
    assert connection.unread_parts == 3


async def test_a_long_body_without_length_is_refused_while_it_is_read(
    models: list[ServedModel], backend: FakeBackend
) -> None:
    app = make_app(models, backend, lambda: GatewaySettings(max_body_bytes=100))
    connection = await Connection(PATH, [b"x" * 60] * 10).run(app)
    assert connection.status == 413
    assert connection.unread_parts == 8


async def test_a_body_in_parts_is_joined(app: GatewayApp) -> None:
    data = json.dumps(CHAT).encode()
    assert (await Connection(PATH, [data[:10], data[10:20], b"", data[20:]]).run(app)).status == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour", "unknown_parameter"),
        ({"guided_json": {}}, "guided_json", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"tool_choice": "auto"}, "tool_choice", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "unsupported_value"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
        ({"store": True}, "store", "unsupported_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs", None),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", None),
        ({"logit_bias": {"512": 1}}, "logit_bias", None),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]", "invalid_value"),
        ({"stop_token_ids": [512]}, "stop_token_ids", None),
        ({"n": 129}, "n", None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", None),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", None),
    ],
)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], param: str, code: str | None
) -> None:
    answer = await client.post(PATH, json=CHAT | fields)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert backend.requests == []


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
async def test_media_are_refused_by_name(client: httpx.AsyncClient, kind: str) -> None:
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}],
    }
    answer = await client.post(PATH, json=CHAT | {"messages": [message]})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages[0].content[1].type"
    assert kind in error_of(answer)["message"]
    assert "text" in error_of(answer)["message"]


async def test_fields_without_effect_are_accepted(client: httpx.AsyncClient) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "store": False,
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "functions": None,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "medium",
    }
    assert (await client.post(PATH, json=CHAT | harmless)).status_code == 200


async def test_a_number_written_as_a_float_is_an_integer(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await client.post(PATH, json=CHAT | {"max_tokens": 5.0, "temperature": 0.5})).status_code == 200
    assert backend.requests[0].sampling.max_tokens == 5
    assert (await client.post(PATH, json=CHAT | {"max_tokens": 5.5})).status_code == 400


async def test_a_long_context_says_both_lengths(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 513})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert "512" in error_of(answer)["message"]
    assert "513" in error_of(answer)["message"]
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": [5] * 500, "max_tokens": 13})
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert "13" in error_of(answer)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("all full", 2.5), 503, "3"),
        (EngineDead("rank 3"), 503, "7"),
        (StreamLost("2 logprobs for 3 tokens"), 503, "7"),
        (RequestError("no such thing", "top_k", "unsupported_value"), 400, None),
        (RuntimeError("secret"), 500, None),
    ],
)
async def test_what_the_engine_refuses_has_its_own_status(
    models: list[ServedModel],
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    app = make_app(models, FakeBackend(fail(error)), lambda: GatewaySettings(retry_after_s=7))
    answer = await client_of(app).post(PATH, json=CHAT | {"stream": stream}, headers={"x-request-id": "r-1"})
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.text
    assert error_of(answer)["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert answer.headers["x-request-id"] == "r-1"
    assert any("r-1" in record.message and record.levelno >= logging.WARNING for record in caplog.records)
    assert any(record.exc_info for record in caplog.records) == (status == 500)
    if status == 500:
        assert "r-1" in error_of(answer)["message"]


async def test_more_sequences_than_allowed_are_refused_until_others_end(
    models: list[ServedModel], backend: FakeBackend
) -> None:
    limits = GatewaySettings(max_in_flight=2)
    app = make_app(models, backend, lambda: limits)
    answer = await client_of(app).post(PATH, json=CHAT | {"n": 3})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert error_of(answer)["type"] == "rate_limit_error"
    assert (await client_of(app).post(PATH, json=CHAT | {"n": 2})).status_code == 200
    assert (await client_of(app).post(PATH, json=CHAT | {"n": 2})).status_code == 200


async def test_settings_change_live(models: list[ServedModel], backend: FakeBackend) -> None:
    limits = GatewaySettings(default_max_tokens=3)
    app = make_app(models, backend, lambda: limits)
    await client_of(app).post(PATH, json=CHAT)
    limits = GatewaySettings(default_max_tokens=4)
    await client_of(app).post(PATH, json=CHAT)
    assert [request.sampling.max_tokens for request in backend.requests] == [3, 4]


async def test_a_request_that_takes_too_long_is_cancelled(models: list[ServedModel]) -> None:
    backend = FakeBackend(silent())
    app = make_app(models, backend, lambda: GatewaySettings(request_timeout_s=0.01))
    answer = await client_of(app).post(PATH, json=CHAT)
    assert answer.status_code == 408
    assert error_of(answer)["type"] == "timeout_error"
    assert backend.running == 0
    assert len(backend.cancelled) == 1


async def test_metrics_count_what_happened(client: httpx.AsyncClient, model: ServedModel, backend: FakeBackend) -> None:
    backend.script = say(tokens_of(model, "one two three four"), cached_tokens=2)
    tokens = len(tokens_of(model, "one two three four"))
    await client.post(PATH, json=CHAT)
    await client.post("/nothing-of-note")
    await client.post("/v1/completions", json={"model": "nope", "prompt": ""})
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'raytrt_requests_total{endpoint="/v1/chat/completions",model="tiny",status="200"} 1.0' in lines
    assert 'raytrt_requests_total{endpoint="",model="",status="404"} 1.0' in lines
    assert 'raytrt_requests_total{endpoint="/v1/completions",model="",status="404"} 1.0' in lines
    assert f'raytrt_completion_tokens_total{{model="tiny"}} {float(tokens)}' in lines
    assert 'raytrt_cached_prompt_tokens_total{model="tiny"} 2.0' in lines
    assert 'raytrt_ttft_seconds_count{model="tiny"} 1.0' in lines
    assert f'raytrt_itl_seconds_count{{model="tiny"}} {float(tokens - 1)}' in lines
    assert 'raytrt_tpot_seconds_count{model="tiny"} 1.0' in lines
    assert 'raytrt_e2e_seconds_bucket{le="+Inf",model="tiny"} 1.0' in lines
    assert 'raytrt_queue_seconds_sum{model="tiny"} 0.25' in lines
    assert 'raytrt_sequences_in_flight{model="tiny"} 0.0' in lines
    assert 'raytrt_sequences_waiting{model="tiny"} 0.0' in lines


async def test_lifespan(app: GatewayApp) -> None:
    inbox, outbox = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive() -> dict[str, Any]:
        return inbox.pop(0)

    async def send(message: Any) -> None:
        outbox.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert outbox == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_websockets_are_refused(app: GatewayApp) -> None:
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_tokenize_and_detokenize(client: httpx.AsyncClient, model: ServedModel) -> None:
    answer = await client.post("/tokenize", json={"model": "tiny", "prompt": "hello there", "return_token_strs": True})
    body = answer.json()
    assert body["tokens"] == [1, *tokens_of(model, "hello there")]
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 512
    assert "".join(body["token_strs"]) == "<|bos|>hello there"
    back = await client.post("/detokenize", json={"model": "tiny", "tokens": body["tokens"]})
    assert back.json() == {"prompt": "<|bos|>hello there"}
    chat = await client.post("/tokenize", json={"model": "tiny", "messages": CHAT["messages"]})
    assert chat.json()["tokens"][-1] == 4
