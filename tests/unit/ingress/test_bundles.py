"""What clients and operators are told of bundles, and of replicas that are starting."""

from dataclasses import replace
from typing import Any

import httpx
import pytest
from ray.serve.schema import (
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)

from serve.ingress.api import make_app
from serve.ingress.backend import ModelReadiness
from serve.ingress.models import ServedModel
from serve.ingress.serve_backend import _as_before, _is_starting, _readiness
from serve.ingress.settings import GatewaySettings
from tests.unit.ingress.conftest import client_of, tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, say

OLD, NEW = "a" * 64, "b" * 64
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_names_the_bundle_that_gave_it(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel, stream: bool
) -> None:
    backend.script = say(tokens_of(model, "Hello"), bundle=NEW)
    answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert answer.headers["x-raytrt-bundle"] == NEW


async def test_during_a_rollout_an_answer_may_have_been_given_by_two(
    client: httpx.AsyncClient, backend: FakeBackend, model: ServedModel
) -> None:
    tokens = tokens_of(model, "Hello")
    backend.script = [say(tokens, bundle=OLD), say(tokens, bundle=NEW), say(tokens, bundle=OLD)]
    answer = await client.post("/v1/chat/completions", json=CHAT | {"n": 3})
    assert sorted(answer.headers["x-raytrt-bundle"].split(", ")) == [OLD, NEW]


async def test_models_from_checkpoints_have_none(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert "x-raytrt-bundle" not in answer.headers
    assert "bundle" not in (await client.get("/v1/models/tiny")).json()


async def test_the_list_of_models_has_the_bundle_that_is_configured(model: ServedModel, backend: FakeBackend) -> None:
    client = client_of(make_app([replace(model, bundle=NEW)], backend, GatewaySettings))
    assert (await client.get("/v1/models")).json()["data"][0]["bundle"] == NEW


def status(name: str = "UPDATING", **replicas: int) -> DeploymentStatusOverview:
    states = {ReplicaState(state): count for state, count in replicas.items()}
    return DeploymentStatusOverview(DeploymentStatus(name), DeploymentStatusTrigger("UNSPECIFIED"), states, "")


def test_readiness_tells_what_starting_replicas_do() -> None:
    starting = status(RUNNING=1, STARTING=2)
    assert _is_starting(starting)
    text = "downloading bundle llama@prod 1f3c: 34 % of 15.2 GB, 210 MB/s"
    found = _readiness("m", starting, [text, text])  # replicas of one node share a download
    assert found == ModelReadiness("m", 1, 3, f"2 starting, {text}")
    assert _readiness("m", status("HEALTHY", RUNNING=1), [text]).message == ""
    assert not _is_starting(status("HEALTHY", RUNNING=1))
    assert not _is_starting(None)


def test_a_gateway_stays_ready_while_its_application_is_built_anew() -> None:
    before = [ModelReadiness("m", 2, 2), ModelReadiness("n", 0, 0, asleep=True)]
    found = [ModelReadiness("m", 0, 0, "not deployed"), ModelReadiness("n", 0, 0), ModelReadiness("x", 0, 0, "new")]
    states = {state.model: state for state in _as_before(before, found)}
    assert states["m"] == ModelReadiness("m", 2, 2, "a new configuration is being built")
    assert states["n"].asleep
    assert states["x"].message == "new"
