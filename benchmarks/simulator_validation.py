"""Does the simulator tell the truth? `make bench-simulator`: the same requests live and simulated, side by side.

    python -m benchmarks.simulator_validation

Live: Ray Serve, gateway, router, event plane and four replicas of the simulated engine in real time (a 70B model on
four H100s each, by the roofline latency model). Simulated: `sim`, with the same engine settings, and the arrival times
that the live run really had. What the two share is the engine's scheduler and the routing code; what is compared is
everything between: queues, stale load, event delays, and what prefixes are where.
"""

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.load import Connection, StreamRecord
from benchmarks.report import Report
from serve.core.blocks import block_hashes
from serve.core.routing.settings import make_policy, parse_policy
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.simulator import simulate
from sim.workload import SimRequest
from tests.integration.serving import Serving

QUICKSTART = Path(__file__).parents[1] / "serve/models/quickstart"
REPLICAS = 4
REQUESTS = 300
PER_S = 5.0
BLOCK = 64
POLICIES = ("predictive", "power_of_two")
ENGINE = SimulatedSettings(
    vocab_size=3072,
    token_range=(300, 3000),
    tokens_per_block=BLOCK,
    context_tokens=32768,
    latency=RooflineSettings(model="llama-3.3-70b", tensor_parallel=4),
)
WITHIN = 0.10


@dataclass(frozen=True)
class Asked:
    """One request: when it is sent, what it says, and how long the answer is."""

    at_s: float
    prompt: list[int]
    output_tokens: int


def requests(seed: int = 1) -> list[Asked]:
    """Return conversations of several turns over a few long system prompts."""
    rng = random.Random(seed)
    systems = [_words(rng, rng.randint(500, 4000)) for _ in range(8)]
    asked: list[Asked] = []
    at_s = 0.0
    while len(asked) < REQUESTS * 1.3:
        at_s += rng.expovariate(PER_S / 3)
        prompt, turn_s = list(systems[min(7, int(rng.expovariate(0.5)))]), at_s
        for _ in range(rng.randint(1, 5)):
            prompt = prompt + _words(rng, min(8000, int(rng.lognormvariate(7.5, 0.8))))
            if len(prompt) > 24_000:
                break
            asked.append(Asked(turn_s, prompt, rng.randint(20, 120)))
            turn_s += 4.0 + rng.expovariate(1 / 6)
    asked.sort(key=lambda request: request.at_s)
    return asked[:REQUESTS]


def _words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 500) for _ in range(count)]


def main() -> None:
    """Run both, for each policy, and write the report."""
    report = Report("simulator_validation", "python -m benchmarks.simulator_validation")
    asked = requests()
    mean = sum(len(one.prompt) for one in asked) / len(asked)
    for name in POLICIES:
        with tempfile.TemporaryDirectory() as directory:
            sent_s, records = _live(asked, Path(directory), name)
        outcome = _simulated(asked, sent_s, name)
        _compare(report, name, records, outcome)
    report.note(
        f"{len(asked)} requests at {PER_S:g}/s, {mean:.0f} prompt tokens on average, {REPLICAS} replicas. TTFT is the "
        "client's, with the gateway's own few ms, which the simulator knows nothing of."
    )
    report.finish()


def _live(asked: list[Asked], directory: Path, policy: str) -> tuple[list[float], list[StreamRecord]]:
    print(f"live, {policy}:", file=sys.stderr)
    model = {
        "id": "m",
        "model": str(_long_model(directory / "model")),
        "engine": ENGINE.model_dump(mode="json"),
        "replicas": REPLICAS,
        "routing": {"policy": policy},
        "resources": {"num_cpus": 0.05},
    }
    serving = Serving({"models": [model], "gateway": {"num_cpus": 0.05}}, directory)
    try:
        serving.wait_until_ready()
        sent_s, records = uvloop.run(_send(serving.port, asked))
        return sent_s, records
    finally:
        serving.end()


def _long_model(directory: Path) -> Path:
    """Return the quickstart model's files as those of a model with a long context; its weights are not needed."""
    shutil.copytree(QUICKSTART, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": ENGINE.context_tokens}))
    return directory


async def _send(port: int, asked: list[Asked]) -> tuple[list[float], list[StreamRecord]]:
    free: list[Connection] = []

    async def one(request: Asked) -> StreamRecord:
        await asyncio.sleep(max(0.0, start_s + request.at_s - time.monotonic()))
        connection = await (free.pop().renewed(port) if free else Connection.open(port))
        body = {
            "model": "m",
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        record = await connection.request("/v1/completions", body)
        if record.status != 200 or not record.complete:
            raise RuntimeError(f"status {record.status}: {record.body[:300]!r}")
        free.append(connection)
        return record

    start_s = time.monotonic() + 1.0
    records = await asyncio.gather(*[one(request) for request in asked])
    first_s = min(record.sent_s for record in records)
    return [record.sent_s - first_s for record in records], list(records)


def _simulated(asked: list[Asked], sent_s: list[float], policy: str) -> Outcome:
    made = [
        SimRequest(
            at_s,
            len(request.prompt),
            request.output_tokens,
            block_hashes(request.prompt, BLOCK).tolist(),
            max_tokens=request.output_tokens,
        )
        for at_s, request in zip(sent_s, asked, strict=True)
    ]
    made.sort(key=lambda request: request.arrival_s)
    return simulate(made, [ENGINE] * REPLICAS, make_policy(parse_policy(policy)), SimOptions())


def _compare(report: Report, name: str, records: list[StreamRecord], outcome: Outcome) -> None:
    live = np.array([record.ttft_s for record in records])
    for percent in (50, 90):
        real, told = float(np.percentile(live, percent)), float(np.percentile(outcome.ttft_s, percent))
        report.add(f"{name}: TTFT p{percent}, live", 1e3 * real, "ms")
        report.add(f"{name}: TTFT p{percent}, simulated", 1e3 * told, "ms")
        report.add(f"{name}: TTFT p{percent}, error", 100 * abs(told / real - 1.0), "%", f"<= {100 * WITHIN:g}")


if __name__ == "__main__":
    main()
