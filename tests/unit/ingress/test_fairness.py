"""Tenants and priorities at the HTTP API: who waits when there is no room, and what is said about it."""

import asyncio
import json
from typing import Any

import pytest

from serve.core.routing.load import LoadReport
from serve.ingress.api import GatewayApp
from serve.ingress.models import ServedModel
from serve.ingress.routing_desk import RoutingDesk
from serve.router.board import RoutingBoard
from tests.unit.ingress.asgi import Connection, post
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, say
from tests.unit.router.boards import make_board, prompt

PATH = "/v1/completions"
REPLICA = "app#model-tiny#a"


@pytest.fixture
def board() -> RoutingBoard:
    fairness = {"weights": {"acme": 2.0}, "full_waiting": 1, "full_wait_s": 1e6, "max_queued": 3, "max_wait_s": 60}
    board, _, _ = make_board(REPLICA, policy={"policy": "least_requests", "fairness": fairness}, model="tiny")
    return board


@pytest.fixture
def backend(model: ServedModel, board: RoutingBoard) -> FakeBackend:
    return FakeBackend(say(tokens_of(model, "Hello!")), desk=RoutingDesk({"tiny": board}))


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt(1, blocks=2), "max_tokens": 2, **fields}


def report(board: RoutingBoard, waiting: int) -> None:
    """Let the replica say that so many wait there."""
    board.roster.report(REPLICA, LoadReport(total_blocks=1000, waiting=waiting))


async def queued(app: GatewayApp, number: int) -> dict[str, float]:
    """Wait until so many sequences wait; return how many of each tenant."""
    async with asyncio.timeout(10):
        while True:
            text = (await Connection("/metrics", method="GET").run(app)).answer.decode()
            lines = [line for line in text.splitlines() if line.startswith("raytrt_routing_queued_sequences{")]
            counts = {line.split('tenant="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
            if sum(counts.values()) == number:
                return counts
            await asyncio.sleep(0)


async def test_who_finds_room_does_not_wait(app: GatewayApp) -> None:
    answer = await post(app, PATH, body(), x_raytrt_explain="1")
    (record,) = json.loads(answer.answer)["raytrt"]["routing"]
    assert record["times"]["waited_s"] == 0


async def test_sequences_wait_for_room_and_are_served_by_priority(
    app: GatewayApp, backend: FakeBackend, board: RoutingBoard
) -> None:
    report(board, 1)
    tasks = []
    for number, extra in enumerate(({"priority": 1}, {}, {"priority": -1})):
        sent = body(prompt=prompt(number, blocks=2), **extra)
        tasks.append(asyncio.create_task(post(app, PATH, sent, x_tenant_id="acme", x_raytrt_explain="1")))
        assert await queued(app, number + 1) == {"acme": number + 1}
    assert backend.requests == []
    report(board, 0)
    answers = await asyncio.gather(*tasks)
    assert [answer.status for answer in answers] == [200] * 3
    served = [request.prompt_array().tolist() for request in backend.requests]
    assert served == [prompt(number, blocks=2) for number in (2, 1, 0)]
    (record,) = json.loads(answers[0].answer)["raytrt"]["routing"]
    assert record["times"]["waited_s"] > 0


async def test_a_header_overrides_the_field(app: GatewayApp, backend: FakeBackend, board: RoutingBoard) -> None:
    report(board, 1)
    one = asyncio.create_task(post(app, PATH, body(prompt=prompt(1, 2), priority=-2), x_raytrt_priority="2"))
    await queued(app, 1)
    two = asyncio.create_task(post(app, PATH, body(prompt=prompt(2, 2)), x_raytrt_priority="1"))
    await queued(app, 2)
    report(board, 0)
    await asyncio.gather(one, two)
    assert [request.prompt_array().tolist() for request in backend.requests] == [prompt(2, 2), prompt(1, 2)]


async def test_a_priority_that_is_none_is_refused(app: GatewayApp) -> None:
    answer = await post(app, PATH, body(), x_raytrt_priority="high")
    assert answer.status == 400
    error = json.loads(answer.answer)["error"]
    assert error["param"] == "x-raytrt-priority"
    assert "'high'" in error["message"]
    assert (await post(app, PATH, body(priority="high"))).status == 400


async def test_who_cannot_wait_is_told_when_to_come_back(app: GatewayApp, board: RoutingBoard) -> None:
    report(board, 1)
    flood = [asyncio.create_task(post(app, PATH, body(n=3), x_tenant_id="flood"))]
    assert await queued(app, 3) == {"flood": 3}
    more = await post(app, PATH, body(), x_tenant_id="flood")
    assert more.status == 503
    assert int(more.answer_headers["retry-after"]) >= 1
    assert json.loads(more.answer)["error"]["code"] == "overloaded"
    report(board, 0)
    (served,) = await asyncio.gather(*flood)
    assert served.status == 200
    metrics = (await Connection("/metrics", method="GET").run(app)).answer.decode()
    assert 'raytrt_routing_turned_away_total{model="tiny",reason="full"} 1.0' in metrics
    assert 'raytrt_routing_queue_wait_seconds_count{model="tiny"} 3.0' in metrics
