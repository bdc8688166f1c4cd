"""What a client sees when something breaks, and that nothing stays behind."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.serving import Serving

SMALL = {"num_cpus": 0.05}
DEADLINE_S = 60.0
CONTEXT_TOKENS = 3500


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A system of its own that tests may break, started with SIGINT ignored, as shells start what is followed by &."""
    engine = {
        "kind": "simulated",
        "latency": {"kind": "fixed", "decode_step_s": 0.01},
        "context_tokens": CONTEXT_TOKENS,  # less than the model's files say
    }
    model = {"id": "sim", "engine": engine, "replicas": 2, "resources": SMALL, "limits": {"health_check_period_s": 1}}
    up = ("env", "--ignore-signal=INT", str(Path(sys.executable).with_name("raytrt")), "up")
    serving = Serving({"models": [model], "gateway": {"num_cpus": 0.05}}, tmp_path_factory.mktemp("fragile"), up)
    try:
        serving.wait_until_ready()
        yield serving
    finally:
        serving.end()


@pytest.fixture
async def http(fragile: Serving) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fragile.url, timeout=DEADLINE_S) as client:
        yield client


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process does; nothing announces it here."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.1)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "sim", "prompt": "x", "max_tokens": 1000, "stream": True, **fields}


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def in_flight(serving: Serving) -> float:
    _, text = serving.get("/metrics")
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("raytrt_sequences_in_flight")]
    assert values
    return sum(values)


async def test_a_client_that_goes_away_cancels_its_sequences(fragile: Serving, http: httpx.AsyncClient) -> None:
    async with http.stream("POST", "/v1/completions", json=completion(n=4, max_tokens=3000)) as response:
        received = events(response)
        await anext(received)
        assert in_flight(fragile) == 4
    await eventually(lambda: in_flight(fragile) == 0, "the sequences were not cancelled")


async def test_a_killed_replica_ends_its_streams_with_an_error_event_and_is_replaced(
    fragile: Serving, http: httpx.AsyncClient
) -> None:
    before = fragile.replica_pids("model-sim")
    assert len(before) == 2

    received: list[list[dict[str, Any] | str]] = [[] for _ in range(16)]

    async def read(into: list[dict[str, Any] | str]) -> None:
        async with http.stream("POST", "/v1/completions", json=completion()) as response:
            async for event in events(response):
                into.append(event)  # noqa: PERF401  # looked at while it goes on

    async with asyncio.TaskGroup() as group:
        for into in received:
            group.create_task(read(into))
        await eventually(lambda: all(received), "the streams did not start")
        os.kill(before[0], signal.SIGKILL)
    endings = [into[-2] if into[-1] == "[DONE]" else into[-1] for into in received]
    broken = [ending for ending in endings if isinstance(ending, dict) and "error" in ending]
    whole = [ending for ending in endings if isinstance(ending, dict) and "error" not in ending]
    assert broken, "no stream ran on the replica that was killed"
    assert whole, "a stream on the other replica was cut"
    await eventually(lambda: _is_whole_without(fragile, before[0]), "the replica was not replaced")


async def test_new_requests_are_served_while_a_replica_is_being_replaced(
    fragile: Serving, http: httpx.AsyncClient
) -> None:
    victim = fragile.replica_pids("model-sim")[0]
    os.kill(victim, signal.SIGKILL)
    statuses = [
        (await http.post("/v1/completions", json=completion(stream=False, max_tokens=1))).status_code for _ in range(50)
    ]
    assert statuses == [200] * 50
    await eventually(lambda: _is_whole_without(fragile, victim), "the replica was not replaced")


async def test_the_log_has_what_matters(fragile: Serving, http: httpx.AsyncClient) -> None:
    assert "Serving sim with simulated" in fragile.log()
    assert fragile.get("/v1/models/sim")[1]["max_model_len"] == CONTEXT_TOKENS
    long = completion(stream=False, prompt="x " * 2 * CONTEXT_TOKENS)
    assert (await http.post("/v1/completions", json=long)).status_code == 400
    await eventually(lambda: "context_length_exceeded" in fragile.log(), "the refusal was not logged")


def test_sigterm_ends_everything(fragile: Serving) -> None:
    fragile.process.terminate()
    fragile.process.wait(60)
    assert not fragile.processes()


def _is_whole_without(serving: Serving, pid: int) -> bool:
    """Whether two replicas are ready, and neither is the one that was killed (Serve notices that a while later)."""
    status, body = serving.get("/ready")
    pids = serving.replica_pids("model-sim")
    return status == 200 and body["models"][0]["ready_replicas"] == 2 and len(pids) == 2 and pid not in pids
