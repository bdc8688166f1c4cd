"""x-raytrt-explain, /debug/requests, /debug/route and the metrics of routing, over real boards."""

import asyncio
import json
from typing import Any

import pytest

from serve.errors import EngineDead
from serve.ingress.api import GatewayApp, make_app
from serve.ingress.models import ServedModel
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.settings import GatewaySettings
from serve.router.board import RoutingBoard
from serve.router.records import RouteRecord
from tests.unit.ingress.asgi import Connection, post
from tests.unit.ingress.conftest import tokens_of
from tests.unit.ingress.fake_backend import FakeBackend, fail, say, say_for_ever
from tests.unit.router.boards import holds, make_board, prompt

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": prompt(1), "max_tokens": 4}
EXPLAIN = {"x_raytrt_explain": "1"}


@pytest.fixture
def board() -> RoutingBoard:
    board, _, _ = make_board("app#model-tiny#a", "app#model-tiny#b", model="tiny")
    holds(board, "app#model-tiny#b", prompt(1))
    return board


@pytest.fixture
def backend(model: ServedModel, board: RoutingBoard) -> FakeBackend:
    script = say(tokens_of(model, "Hello there, 世界 😀!"), cached_tokens=16)
    return FakeBackend(script, desk=RoutingDesk({"tiny": board}))


def body(connection: Connection) -> Any:
    return json.loads(connection.answer)


async def get(app: GatewayApp, path: str) -> Connection:
    return await Connection(path, method="GET").run(app)


async def test_an_answer_explains_how_it_was_routed(app: GatewayApp) -> None:
    answer = await post(app, COMPLETIONS, COMPLETION, **EXPLAIN, x_tenant_id="acme", x_request_id="mine")
    assert answer.answer_headers["x-raytrt-replica"] == "b"
    (record,) = body(answer)["raytrt"]["routing"]
    assert (record["replica"], record["state"], record["tenant"], record["request_id"]) == (
        "b",
        "finished",
        "acme",
        "mine",
    )
    assert (record["expected_cached_tokens"], record["cached_tokens"]) == (8 * 16, 16)
    assert (record["times"]["queue_s"], record["times"]["prefill_s"]) == (0.25, 0.5)
    assert record["times"]["ttft_s"] > 0
    assert record["times"]["predicted_ttft_s"] is not None
    decision = record["decision"]
    assert decision["policy"] == "predictive"
    assert decision["rule"]
    first, second = decision["candidates"]
    assert (first["replica"], first["chosen"], first["hit_blocks"]) == ("b", True, {"gpu": 8, "host": 0, "disk": 0})
    assert (second["replica"], second["chosen"], second["hit_blocks"]["gpu"]) == ("a", False, 0)
    assert first["cost"] < second["cost"]
    assert first["terms"].keys() == second["terms"].keys() != set()


@pytest.mark.parametrize(("path", "request_body"), [(CHATS, CHAT), (COMPLETIONS, COMPLETION)])
@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_explains_in_its_last_chunk(
    app: GatewayApp, path: str, request_body: dict[str, Any], usage: bool
) -> None:
    options = {"stream": True, "n": 2, "stream_options": {"include_usage": usage}}
    answer = await post(app, path, request_body | options, **EXPLAIN)
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert bool(last.get("usage")) is usage
    assert all("raytrt" not in chunk for chunk in chunks)
    routing = last["raytrt"]["routing"]
    assert [record["sequence_id"].rsplit("-")[-1] for record in routing] == ["0", "1"]
    assert {record["state"] for record in routing} == {"finished"}
    assert set(answer.answer_headers["x-raytrt-replica"].split(", ")) <= {"a", "b"}


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_explained_to_who_did_not_ask(app: GatewayApp, stream: bool) -> None:
    answer = await post(app, COMPLETIONS, COMPLETION | {"stream": stream})
    assert "x-raytrt-replica" not in answer.answer_headers
    assert b"raytrt" not in answer.answer


async def test_timing_and_explanation_go_together(app: GatewayApp) -> None:
    answer = await post(app, CHATS, CHAT | {"stream": True}, **EXPLAIN, x_raytrt_timing="1")
    *chunks, last, _ = answer.events
    assert all(chunk["raytrt"].keys() >= {"emitted_s", "tokens"} for chunk in chunks)
    assert last["raytrt"].keys() == {"routing"}


async def test_a_stop_string_that_the_gateway_found_is_a_cancelled_sequence(app: GatewayApp) -> None:
    answer = await post(app, CHATS, CHAT | {"stop": "there"}, **EXPLAIN)
    (record,) = body(answer)["raytrt"]["routing"]
    assert (record["state"], record["finish_reason"]) == ("cancelled", None)
    assert record["output_tokens"] > 0


async def test_a_request_is_known_by_the_id_that_its_client_got(app: GatewayApp) -> None:
    answer = await post(app, COMPLETIONS, COMPLETION | {"n": 3})
    request_id = answer.answer_headers["x-request-id"]
    found = await get(app, f"/debug/requests/{request_id}")
    assert found.status == 200
    assert body(found)["request_id"] == request_id
    sequences = body(found)["sequences"]
    assert [record["sequence_id"].rsplit("-")[-1] for record in sequences] == ["0", "1", "2"]
    assert [record["output_tokens"] for record in sequences] == [4, 4, 4]


async def test_an_id_that_was_used_twice_has_the_sequences_of_both(app: GatewayApp) -> None:
    for _ in range(2):
        await post(app, CHATS, CHAT, x_request_id="a/b:c")
    assert len(body(await get(app, "/debug/requests/a/b:c"))["sequences"]) == 2


async def test_a_request_in_flight_and_one_that_failed_are_known(
    models: list[ServedModel], backend: FakeBackend
) -> None:
    backend.script = [fail(EngineDead("gone"), after=[5]), say_for_ever(5)]
    app = make_app(models, backend, GatewaySettings)
    assert (await post(app, CHATS, CHAT, x_request_id="failed")).status == 503
    (record,) = body(await get(app, "/debug/requests/failed"))["sequences"]
    assert (record["state"], record["output_tokens"]) == ("failed", 1)
    connection = Connection(CHATS, [json.dumps(CHAT | {"stream": True, "max_tokens": 50}).encode()])
    connection.headers["x-request-id"] = "running"
    states: list[str] = []

    async def look() -> None:
        states.append(body(await get(app, "/debug/requests/running"))["sequences"][0]["state"])
        connection.go_away()

    looking: list[asyncio.Task[None]] = []
    connection.on_message = lambda message: looking.append(asyncio.ensure_future(look())) if not looking else None
    await connection.run(app)
    await looking[0]
    assert states == ["streaming"]
    (record,) = body(await get(app, "/debug/requests/running"))["sequences"]
    assert record["state"] == "cancelled"


async def test_only_the_last_sequences_are_remembered(models: list[ServedModel], backend: FakeBackend) -> None:
    settings = GatewaySettings(routing_records=2)
    backend.desk = RoutingDesk(backend.desk.boards, lambda: settings)
    app = make_app(models, backend, lambda: settings)
    for number in range(4):
        await post(app, CHATS, CHAT, x_request_id=f"r{number}")
    assert [(await get(app, f"/debug/requests/r{number}")).status for number in range(4)] == [404, 404, 200, 200]


async def test_other_gateways_are_asked_before_a_request_is_unknown(
    models: list[ServedModel], backend: FakeBackend
) -> None:
    other = RoutingDesk(backend.desk.boards)
    asked = []

    async def ask(request_id: str) -> list[RouteRecord]:
        asked.append(request_id)
        return other.local_records(request_id)

    backend.desk, mine = other, RoutingDesk(backend.desk.boards, ask_peers=ask)
    await post(make_app(models, backend, GatewaySettings), CHATS, CHAT, x_request_id="theirs")
    backend.desk = mine
    app = make_app(models, backend, GatewaySettings)
    assert body(await get(app, "/debug/requests/theirs"))["sequences"][0]["request_id"] == "theirs"
    unknown = await get(app, "/debug/requests/nobody's")
    assert unknown.status == 404
    assert body(unknown)["error"]["code"] == "request_not_found"
    assert asked == ["theirs", "nobody's"]
    await post(app, CHATS, CHAT, x_request_id="ours")
    assert (await get(app, "/debug/requests/ours")).status == 200
    assert len(asked) == 2


@pytest.mark.parametrize("asked", [CHAT, COMPLETION, {"model": "tiny", "prompt": [prompt(1), prompt(2)], "n": 2}])
async def test_a_preview_says_where_it_would_go_and_runs_nothing(
    app: GatewayApp, backend: FakeBackend, asked: dict[str, Any]
) -> None:
    before = body_of_metrics(await get(app, "/metrics"))
    answer = await post(app, "/debug/route", asked)
    assert answer.status == 200
    prompts = body(answer)["prompts"]
    assert len(prompts) == (2 if "n" in asked else 1)
    assert backend.requests == []
    assert body_of_metrics(await get(app, "/metrics")) == before
    path = CHATS if "messages" in asked else COMPLETIONS
    real = body(await post(app, path, asked | {"max_tokens": 1}, **EXPLAIN))["raytrt"]["routing"]
    assert real[0]["replica"] == prompts[0]["replica"]
    if asked is COMPLETION:
        assert prompts[0]["replica"] == "b"
        assert prompts[0]["expected_cached_tokens"] == 128


def body_of_metrics(connection: Connection) -> list[str]:
    return [line for line in connection.answer.decode().splitlines() if line.startswith("raytrt_routing")]


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"model": "none", "prompt": "Hi"}, 404, "model_not_found"),
        ({"model": "none", "messages": [{"role": "user", "content": "Hi"}]}, 404, "model_not_found"),
        ({"model": "tiny"}, 400, "missing_required_parameter"),
        ({"model": "tiny", "prompt": "Hi", "wrong": 1}, 400, "unknown_parameter"),
        ({"model": "tiny", "messages": []}, 400, "invalid_value"),
        ({"model": "tiny", "prompt": "Hi " * 9000}, 400, "context_length_exceeded"),
        (b"{", 400, "invalid_json"),
        ({"model": "org/tiny-2", "prompt": "Hi"}, 400, "not_routed_here"),
    ],
)
async def test_a_preview_of_what_is_wrong_has_the_usual_errors(
    app: GatewayApp, asked: bytes | dict[str, Any], status: int, code: str
) -> None:
    answer = await post(app, "/debug/route", asked)
    assert (answer.status, body(answer)["error"]["code"]) == (status, code)


async def test_without_replicas_a_preview_goes_nowhere(models: list[ServedModel], backend: FakeBackend) -> None:
    empty, _, _ = make_board()
    backend.desk = RoutingDesk({"tiny": empty})
    answer = await post(make_app(models, backend, GatewaySettings), "/debug/route", COMPLETION)
    (record,) = body(answer)["prompts"]
    assert (record["replica"], record["decision"]) == (None, None)


async def test_debug_routes_can_be_turned_off(models: list[ServedModel], backend: FakeBackend) -> None:
    app = make_app(models, backend, lambda: GatewaySettings(debug_routes=False))
    answer = await post(app, COMPLETIONS, COMPLETION, **EXPLAIN)
    assert answer.status == 200
    assert "x-raytrt-replica" not in answer.answer_headers
    assert b"raytrt" not in answer.answer
    assert (await post(app, "/debug/route", COMPLETION)).status == 404
    known = await get(app, f"/debug/requests/{answer.answer_headers['x-request-id']}")
    assert known.status == 404
    assert "turned off" in body(known)["error"]["message"]


async def test_models_that_serve_places_are_recorded_too(models: list[ServedModel], backend: FakeBackend) -> None:
    app = make_app(models, backend, GatewaySettings)
    answer = await post(app, CHATS, CHAT | {"model": "org/tiny-2"}, **EXPLAIN)
    (record,) = body(answer)["raytrt"]["routing"]
    assert (record["replica"], record["decision"], record["cached_tokens"]) == ("only", None, 16)


async def test_what_routing_counts_is_in_metrics(app: GatewayApp) -> None:
    await post(app, COMPLETIONS, COMPLETION | {"n": 2}, x_tenant_id="acme")
    await post(app, COMPLETIONS, COMPLETION | {"prompt": prompt(2)})
    text = (await get(app, "/metrics")).answer.decode()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    decisions = [value for name, value in values.items() if name.startswith("raytrt_routing_decisions_total{")]
    assert sum(decisions) == 3
    assert values['raytrt_routing_prompt_tokens_total{model="tiny"}'] == 3 * 129
    assert values['raytrt_routing_cached_tokens_total{model="tiny"}'] == 3 * 16
    assert values['raytrt_routing_expected_cached_tokens_total{model="tiny"}'] in (128, 256)
    missed = 'raytrt_routing_missed_blocks_total{model="tiny",reason="never_seen",tenant="default"}'
    assert values[missed] == 8
    assert values['raytrt_routing_ttft_prediction_ratio_count{model="tiny"}'] == 3
    assert values['raytrt_routing_decision_seconds_count{model="tiny"}'] == 3
    assert values['raytrt_routing_index_blocks{model="tiny"}'] == 8
    assert values['raytrt_routing_replicas{heard="yes",model="tiny"}'] == 2
    assert values["raytrt_request_log_dropped_total"] == 0


async def test_the_session_is_a_header_or_the_cache_key_of_openai(app: GatewayApp) -> None:
    sessions = []
    for fields, headers in (
        ({}, {"x_session_id": "alice"}),
        ({"prompt_cache_key": "alice"}, {}),
        ({"prompt_cache_key": "bob"}, {"x_session_id": "alice"}),
        ({}, {}),
    ):
        answer = await post(app, CHATS, CHAT | fields, **EXPLAIN, **headers)
        sessions.append(body(answer)["raytrt"]["routing"][0]["session"])
    assert sessions[0] == sessions[1] == sessions[2] != ""
    assert sessions[3] == ""
