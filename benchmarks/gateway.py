"""What gateway and data path cost, beside Ray Serve's plain two-deployment streaming app in the same run.

`make bench-gateway`, or `python -m benchmarks.gateway`: about five minutes. Engines: `simulated` for everything but
prefix caching, which the `transformers` engine and the quickstart model show.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop
import yaml

from benchmarks.load import Connection, StreamRecord, completion
from benchmarks.plots import save_histogram
from benchmarks.report import RESULTS, Report, percentile
from serve.flags import SERVE_FLAGS
from tests.integration.serving import Serving

STREAMS = 32
QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
SMALL = {"num_cpus": 0.05}
PACED = {"kind": "simulated", "latency": {"kind": "fixed", "decode_step_s": 0.01}}
INSTANT = {"kind": "simulated", "speed": 0}


def main() -> None:
    """Run every part and write the report."""
    report = Report("gateway", "python -m benchmarks.gateway")
    with tempfile.TemporaryDirectory() as directory:
        plain = _with_plain_serve(Path(directory), "Ray Serve's plain two-deployment app, default settings", {})
        fast = _with_plain_serve(Path(directory), "the same with RayTRT's switches of Ray Serve", dict(SERVE_FLAGS))
        _with_raytrt(Path(directory), report, plain, fast)
        _with_quickstart(Path(directory), report)
    report.note(
        "ITL added: absolute difference between each gap of two tokens at the client and in the engine. Delivery: "
        "from a token's emission in the engine to its arrival at the client; 32 are emitted at once, each 10 ms."
    )
    report.note(
        "plain_serve: a FastAPI deployment that streams from a model deployment by a Serve handle, without tokenizing; "
        "plain_serve_fast: the same with the switches that `raytrt env` prints."
    )
    report.note("Histograms: benchmarks/results/gateway_latency.png.")
    report.finish()


@dataclass(frozen=True)
class Plain:
    """What the comparison reaches."""

    burst_tokens_per_s: float
    unary_per_s: float


def _with_plain_serve(directory: Path, title: str, environ: dict[str, str]) -> Plain:
    print(f"{title}:", file=sys.stderr)
    builder = "benchmarks.plain_serve_app:build_app"
    serving = Serving({}, directory, ("serve", "run"), environ, builder)
    try:
        serving.wait_until_ready()
        plain = Plain(uvloop.run(_burst(serving.port, "plain", 500)), uvloop.run(_unary_rate(serving.port, 2000)))
        print(f"  {plain.burst_tokens_per_s:.0f} tokens/s, {plain.unary_per_s:.0f} requests/s", file=sys.stderr)
        return plain
    finally:
        serving.end()


def _with_raytrt(directory: Path, report: Report, plain: Plain, fast: Plain) -> None:
    print("RayTRT, simulated engine:", file=sys.stderr)
    models = [
        {"id": "paced", "engine": PACED, "resources": SMALL},
        {"id": "instant", "engine": INSTANT, "resources": SMALL},
    ]
    serving = Serving({"models": models, "gateway": {"num_cpus": 0.05}}, directory)
    try:
        serving.wait_until_ready()
        uvloop.run(_gateway_figures(serving, report, plain, fast))
    finally:
        serving.end()


async def _gateway_figures(serving: Serving, report: Report, plain: Plain, fast: Plain) -> None:
    await _burst(serving.port, "instant", 50)  # warm-up
    alone = [await _one(serving.port, completion("paced", 2)) for _ in range(60)]
    together = [
        record for _ in range(15) for record in await _together(serving.port, [completion("paced", 2)] * STREAMS)
    ]
    ttft_alone, ttft_together = ([_ttft_added_ms(r) for r in records] for records in (alone, together))
    report.add("ttft_added_1_stream_p50", statistics.median(ttft_alone), "ms", "<= 4")
    report.add("ttft_added_32_together_p50", statistics.median(ttft_together), "ms", "<= 40")

    before_s, started_s = _gateway_cpu_s(serving), time.monotonic()
    records = await _together(serving.port, [completion("paced", 2000)] * STREAMS)
    cpu_s, tokens = _gateway_cpu_s(serving) - before_s, sum(record.usage_tokens for record in records)
    itl_added = [value for record in records for value in _itl_added_ms(record)]
    delivery = [1e3 * (arrived - emitted) for record in records for arrived, emitted in record.arrivals]
    report.add("paced_rate_32_streams", tokens / (time.monotonic() - started_s), "tokens/s")
    report.add("itl_added_p50", statistics.median(itl_added), "ms", "<= 0.5")
    report.add("itl_added_p99", percentile(itl_added, 0.99), "ms", "<= 4")
    report.add("delivery_p50", statistics.median(delivery), "ms")
    report.add("delivery_p99", percentile(delivery, 0.99), "ms")
    report.add("gateway_cpu_per_1000_tokens", 1e3 * cpu_s / tokens, "s", "<= 0.12")

    unary = await _unary_rate(serving.port, 4000)
    report.add("unary_1_token_c32", unary, "requests/s", ">= 700")
    report.add("plain_serve_unary_c32", plain.unary_per_s, "requests/s")
    report.add("plain_serve_fast_unary_c32", fast.unary_per_s, "requests/s")
    burst = await _burst(serving.port, "instant", 4000)
    report.add("burst_32_streams", burst, "tokens/s", ">= 30000")
    report.add("plain_serve_burst_32_streams", plain.burst_tokens_per_s, "tokens/s")
    report.add("plain_serve_fast_burst_32_streams", fast.burst_tokens_per_s, "tokens/s")
    report.add("burst_over_plain_serve", burst / plain.burst_tokens_per_s, "x", ">= 8")
    save_histogram(
        RESULTS / "gateway_latency.png",
        {
            "TTFT added, 1 stream": ttft_alone,
            "TTFT added, 32 together": ttft_together,
            "ITL added, 32 streams at 100 tokens/s": itl_added,
            "delivery of a token, 32 streams at 100 tokens/s": delivery,
        },
    )


def _with_quickstart(directory: Path, report: Report) -> None:
    print("RayTRT, configs/quickstart.yaml:", file=sys.stderr)
    args = yaml.safe_load(QUICKSTART.read_text())["applications"][0]["args"]
    started_s = time.monotonic()
    serving = Serving(args, directory)
    try:
        serving.wait_until_ready()
        record = uvloop.run(_one(serving.port, completion("quickstart", 8)))
        assert record.complete
        report.add("quickstart_start_to_first_answer", time.monotonic() - started_s, "s", "<= 60")
        report.add("quickstart_idle_memory_of_all_processes_pss", _pss_bytes(serving) / 2**20, "MiB")
    finally:
        serving.end()
    print("the same with one replica:", file=sys.stderr)
    args["models"][0]["replicas"] = 1  # without prefix-aware routing, the second request might go to the other
    serving = Serving(args, directory)
    try:
        serving.wait_until_ready()
        first, second = uvloop.run(_shared_prefix(serving.port))
        report.add("ttft_2000_token_prompt_first", 1e3 * first, "ms")
        report.add("ttft_2000_token_prompt_same_prefix", 1e3 * second, "ms")
        report.add("ttft_gain_of_prefix_cache", first / second, "x", ">= 5")
    finally:
        serving.end()


async def _shared_prefix(port: int) -> tuple[float, float]:
    """Return median TTFTs of prompts with a new 2,000-token prefix, and of others with the same prefix."""
    first: list[float] = []
    second: list[float] = []
    for round_number in range(5):
        prefix = [(7 * position + round_number) % 200 + 300 for position in range(2000)]
        for times, ending in ((first, [5, 6, 7]), (second, [8, 9, 10])):
            body: dict[str, Any] = completion("quickstart", 4) | {"prompt": prefix + ending, "ignore_eos": True}
            times.append((await _one(port, body)).ttft_s)
    return statistics.median(first), statistics.median(second)


async def _one(port: int, body: dict[str, Any]) -> StreamRecord:
    return (await _together(port, [body]))[0]


async def _together(port: int, bodies: list[dict[str, Any]]) -> list[StreamRecord]:
    connections = [await Connection.open(port) for _ in bodies]
    pairs = zip(connections, bodies, strict=True)
    records = await asyncio.gather(*[connection.request("/v1/completions", body) for connection, body in pairs])
    for connection, record in zip(connections, records, strict=True):
        connection.close()
        if record.status != 200 or not record.complete:
            raise RuntimeError(f"status {record.status}: {record.body[:500]!r}")
    return records


async def _burst(port: int, model: str, tokens: int) -> float:
    """Return tokens/s of 32 streams that come as fast as they can."""
    bodies = [completion(model, tokens)] * STREAMS
    started_s = time.monotonic()
    records = await _together(port, bodies)
    return sum(record.usage_tokens for record in records) / (time.monotonic() - started_s)


async def _unary_rate(port: int, requests: int, model: str = "instant") -> float:
    async def worker() -> None:
        connection = await Connection.open(port)
        for _ in range(requests // STREAMS):
            connection = await connection.renewed(port)
            record = await connection.request("/v1/completions", completion(model, 1, stream=False))
            assert record.status == 200, record.body
        connection.close()

    started_s = time.monotonic()
    await asyncio.gather(*[worker() for _ in range(STREAMS)])
    return requests / (time.monotonic() - started_s)


def _ttft_added_ms(record: StreamRecord) -> float:
    return 1e3 * (record.ttft_s - record.engine_ttft_s)


def _itl_added_ms(record: StreamRecord) -> list[float]:
    pairs = zip(record.arrivals, record.arrivals[1:], strict=False)
    return [1e3 * abs((b[0] - a[0]) - (b[1] - a[1])) for a, b in pairs]


def _gateway_cpu_s(serving: Serving) -> float:
    """CPU seconds so far of the gateway, of HAProxy and of its supervisor."""
    return _sum_over(
        serving, lambda process: sum(process.cpu_times()[:2]), ("ServeReplica:llm:gateway", "aproxy", "HAProxyMan")
    )


def _pss_bytes(serving: Serving) -> float:
    return _sum_over(serving, lambda process: process.memory_full_info().pss, ("",))


def _sum_over(serving: Serving, read: Callable[[psutil.Process], float], names: tuple[str, ...]) -> float:
    total = 0.0
    for process in serving.processes():
        line = " ".join([process.name(), *process.cmdline()])
        if any(name in line for name in names):
            total += read(process)
    return total


if __name__ == "__main__":
    main()
