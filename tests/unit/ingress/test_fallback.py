"""A model that its fallback serves: /health, a metric and every answer say so."""

from typing import Any

import httpx
import pytest

from serve.errors import EngineDead
from serve.ingress.models import ServedModel
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, fail, say

ENGINE = "transformers 5.23.0"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


async def test_nothing_is_said_of_models_that_are_served_as_configured(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert "x-raytrt-fallback" not in answer.headers
    assert (await client.get("/health")).json() == {"status": "ok", "fallbacks": {}}
    assert 'raytrt_fallback_active{model="tiny"} 0.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_names_the_engine_that_gave_it(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, stream: bool
) -> None:
    backend.script = say(tokens_of(model, "Hello"), fallback=ENGINE)
    answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert answer.headers["x-raytrt-fallback"] == ENGINE


async def test_a_replica_that_is_not_a_fallback_knows_better_than_what_was_heard(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.served_by_fallback = {"tiny": ENGINE}
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert "x-raytrt-fallback" not in answer.headers


async def test_errors_health_and_metrics_say_what_was_heard(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.served_by_fallback = {"tiny": ENGINE}
    backend.script = fail(EngineDead("gone"))
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code >= 500
    assert answer.headers["x-raytrt-fallback"] == ENGINE
    assert (await client.get("/health")).json()["fallbacks"] == {"tiny": ENGINE}
    metrics = (await client.get("/metrics")).text
    assert 'raytrt_fallback_active{model="tiny"} 1.0' in metrics
    assert 'raytrt_fallback_active{model="org/tiny-2"} 0.0' in metrics
