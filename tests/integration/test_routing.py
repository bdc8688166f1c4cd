"""Routing by what replicas hold: two gateways, four replicas, through the front door."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.core.request_log import RequestLogFormat
from tests.integration.serving import Serving
from tests.integration.test_faults import eventually

SMALL = {"num_cpus": 0.05}
SIZE = 16  # tokens per block
EXPLAIN = {"x-raytrt-explain": "1"}
SIMULATED = {"kind": "simulated", "tokens_per_block": SIZE}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("routed")
    fast = SIMULATED | {"latency": {"kind": "fixed", "prefill_tokens_per_s": 20_000, "decode_step_s": 0.002}}
    slow = SIMULATED | {"latency": {"kind": "fixed", "decode_step_s": 0.05}}
    quick_checks = {"health_check_period_s": 1}
    serving = Serving(
        {
            "models": [
                {
                    "id": "sim",
                    "engine": fast,
                    "replicas": 4,
                    "resources": SMALL,
                    "limits": quick_checks,
                    "routing": "longest_prefix",
                },
                {"id": "auto", "engine": fast, "replicas": 2, "resources": SMALL},
                {
                    "id": "narrow",
                    "engine": slow,
                    "replicas": 2,
                    "resources": SMALL,
                    "limits": {"max_ongoing_requests": 1},
                    "routing": {"policy": "longest_prefix", "max_index_blocks": 10_000},
                },
                {"id": "plain", "engine": fast, "resources": SMALL, "routing": "serve"},
            ],
            "gateway": {"replicas": 2, "num_cpus": 0.05, "limits": {"request_log": str(directory / "requests.jsonl")}},
        },
        directory,
    )
    try:
        serving.wait_until_ready()
        yield serving
    finally:
        serving.end()


@pytest.fixture
async def http(routed: Serving) -> AsyncIterator[httpx.AsyncClient]:
    # A connection for each request: HAProxy gives each to another gateway.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=routed.url, timeout=60, limits=limits) as client:
        yield client


def prompt(number: int, blocks: int = 32) -> list[int]:
    """Return a prompt of whole blocks that no other number shares a block with."""
    return [10 + (number * 997 + position) % 1900 for position in range(blocks * SIZE)]


async def complete(http: httpx.AsyncClient, prompt: list[int], model: str = "sim", **fields: Any) -> dict[str, Any]:
    """Run a prompt; return the record of its routing."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, **fields}
    response = await http.post("/v1/completions", json=body, headers=EXPLAIN)
    assert response.status_code == 200, response.text
    (record,) = response.json()["raytrt"]["routing"]
    assert record["replica"] == response.headers["x-raytrt-replica"]
    assert record["request_id"] == response.headers["x-request-id"]
    return dict(record)


async def preview(http: httpx.AsyncClient, prompt: list[int], model: str = "sim") -> dict[str, Any]:
    """Ask where a prompt would go."""
    response = await http.post("/debug/route", json={"model": model, "prompt": prompt})
    assert response.status_code == 200, response.text
    (record,) = response.json()["prompts"]
    return dict(record)


async def known_everywhere(http: httpx.AsyncClient, prompt: list[int], replica: str, blocks: int) -> None:
    """Wait until both gateways have heard that a replica holds a prompt: an event takes milliseconds."""
    agreed = 0
    async with asyncio.timeout(30):
        while agreed < 6:
            record = await preview(http, prompt)
            held = {one["replica"]: one["hit_blocks"]["gpu"] for one in record["decision"]["candidates"]}
            agreed = agreed + 1 if held.get(replica, 0) >= blocks else 0


async def test_a_prompt_goes_to_who_holds_its_prefix_through_whichever_gateway(http: httpx.AsyncClient) -> None:
    shared = prompt(1)
    first = await complete(http, shared)
    assert first["cached_tokens"] == 0
    assert [miss["reason"] for miss in first["misses"]] == ["never_seen"]
    await known_everywhere(http, shared, first["replica"], 31)
    for suffix in range(8):
        record = await complete(http, [*shared, *prompt(50 + suffix, 1)])
        assert record["replica"] == first["replica"]
        assert record["expected_cached_tokens"] == record["cached_tokens"] == len(shared)
        assert record["attempts"] == 1
    decision = record["decision"]
    assert decision["policy"] == "longest_prefix"
    assert len(decision["candidates"]) == decision["num_candidates"] == 4
    assert all(one["report_age_s"] < 5 for one in decision["candidates"])


async def test_by_default_time_is_predicted_and_compared_with_what_came_true(http: httpx.AsyncClient) -> None:
    for number in range(8):
        record = await complete(http, prompt(20 + number), "auto")
    assert record["decision"]["policy"] == "predictive"
    times = record["times"]
    assert 0 < times["predicted_ttft_s"] < 10
    assert 0 < times["ttft_s"] < times["total_s"]
    assert all(times[name] is not None for name in ("to_accept_s", "queue_s", "prefill_s", "decode_s"))

    async def ratios() -> float:
        text = (await http.get("/metrics")).text
        return _values(text)['raytrt_routing_ttft_prediction_ratio_count{model="auto"}']

    assert max([await ratios() for _ in range(4)]) >= 4, "one of two gateways had at least half of them"


def _values(text: str) -> dict[str, float]:
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}


async def test_a_preview_agrees_with_what_then_happens(http: httpx.AsyncClient) -> None:
    held = prompt(2)
    holder = (await complete(http, held))["replica"]
    await known_everywhere(http, held, holder, 31)
    for suffix in range(4):
        asked = [*held, *prompt(70 + suffix, 2)]
        would, did = await preview(http, asked), await complete(http, asked)
        assert would["replica"] == did["replica"] == holder
        assert would["expected_cached_tokens"] == did["cached_tokens"] == len(held)


async def test_different_prompts_spread_over_the_replicas(http: httpx.AsyncClient) -> None:
    records = await asyncio.gather(*(complete(http, prompt(100 + number)) for number in range(32)))
    per_replica = [sum(record["replica"] == name for record in records) for name in {r["replica"] for r in records}]
    assert len(per_replica) == 4
    assert max(per_replica) <= 16


async def test_a_request_is_explained_by_whichever_gateway_is_asked(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"model": "sim", "prompt": prompt(3), "n": 2, "max_tokens": 3})
    request_id = answer.headers["x-request-id"]
    for _ in range(8):
        found = await http.get(f"/debug/requests/{request_id}")
        assert found.status_code == 200, found.text
        sequences = found.json()["sequences"]
        assert [one["state"] for one in sequences] == ["finished", "finished"]
        assert [one["output_tokens"] for one in sequences] == [3, 3]
    unknown = await http.get("/debug/requests/nobody")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "request_not_found"


async def test_a_stream_is_explained_too(http: httpx.AsyncClient) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 3}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=EXPLAIN) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert '"routing":[{' in lines[-2]
    assert response.headers["x-raytrt-replica"] in lines[-2]


async def test_a_full_replica_refuses_and_the_next_one_takes_it(http: httpx.AsyncClient) -> None:
    held = prompt(4)
    holder = (await complete(http, held, "narrow", max_tokens=1))["replica"]
    refused: set[str] = set()
    async with asyncio.timeout(60):
        while not refused:  # a gateway that has given the holder its one request does not even ask it
            body = {"model": "narrow", "prompt": held, "max_tokens": 1000, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body, headers=EXPLAIN) as response:
                lines = response.aiter_lines()  # kept: when it is collected, the stream ends
                await anext(lines)
                if response.headers["x-raytrt-replica"] == holder:
                    other = await complete(http, held, "narrow", max_tokens=1)
                    assert other["replica"] != holder
                    refused |= set(other["refused"])
    assert refused == {holder}


async def test_more_requests_than_room_all_get_their_turn(http: httpx.AsyncClient) -> None:
    records = await asyncio.gather(*(complete(http, prompt(200 + number, 2), "narrow") for number in range(8)))
    assert {record["state"] for record in records} == {"finished"}


async def test_rays_own_router_can_be_had_instead(http: httpx.AsyncClient) -> None:
    records = [await complete(http, prompt(5), "plain") for _ in range(4)]
    assert all(record["decision"] is None for record in records)
    assert records[0]["replica"]
    refused = await http.post("/debug/route", json={"model": "plain", "prompt": prompt(5)})
    assert refused.json()["error"]["code"] == "not_routed_here"


async def test_what_routing_counts_is_in_metrics(http: httpx.AsyncClient) -> None:
    held = prompt(6)
    for _ in range(4):
        await complete(http, held)
    text = (await http.get("/metrics")).text
    values = _values(text)
    assert values['raytrt_routing_replicas{heard="yes",model="sim"}'] == 4
    assert values['raytrt_routing_index_blocks{model="sim"}'] > 0
    assert values['raytrt_routing_decision_seconds_count{model="sim"}'] > 0
    assert values['raytrt_kv_feed_messages_total{model="sim"}'] > 0


async def test_requests_are_logged_by_their_hashes(http: httpx.AsyncClient, routed: Serving) -> None:
    await complete(http, prompt(7), user="bob", max_tokens=5)

    def logged() -> bool:
        lines = [line for path in Path(routed.config_path.parent).glob("requests.*.jsonl") for line in _lines(path)]
        return any(one.prompt_tokens == len(prompt(7)) and one.output_tokens == 5 for one in lines)

    await eventually(logged, "the request is not in the log")


def _lines(path: Path) -> list[Any]:
    form = RequestLogFormat()
    return [form.decode(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


async def test_a_killed_replica_is_forgotten_and_requests_go_elsewhere(
    http: httpx.AsyncClient, routed: Serving
) -> None:
    holders: dict[str, list[int]] = {}
    number = 300
    async with asyncio.timeout(60):
        while len(holders) < 4:
            number += 1
            holders.setdefault((await complete(http, prompt(number)))["replica"], prompt(number))
    for replica, held in holders.items():
        await known_everywhere(http, held, replica, 31)
    os.kill(routed.replica_pids("model-sim")[0], signal.SIGKILL)
    after = {replica: await complete(http, held) for replica, held in holders.items()}
    moved = {replica for replica, record in after.items() if record["replica"] != replica}
    assert len(moved) == 1, "one was killed"
    for replica, record in after.items():
        if replica not in moved:
            assert record["cached_tokens"] == len(holders[replica]) - SIZE
    (dead,) = moved
    assert after[dead]["cached_tokens"] == 0

    async def candidates() -> set[str]:
        record = await preview(http, holders[dead])
        return {one["replica"] for one in record["decision"]["candidates"]}

    async with asyncio.timeout(60):
        gone = 0
        while gone < 6:  # at both gateways
            gone = gone + 1 if dead not in await candidates() else 0
        while len(await candidates()) < 4:  # noqa: ASYNC110  # nothing announces it here
            await asyncio.sleep(0.1)
    statuses = [(await complete(http, prompt(400 + number)))["state"] for number in range(20)]
    assert statuses == ["finished"] * 20
