"""What the socket between a replica and an engine of its own environment costs: `make bench-remote-engine`.

    python -m benchmarks.remote_engine

The same simulated engine is read directly, and in another process through its socket, in one run. Latency is from the
engine emitting a token to its reader having it; processor time is that of all processes that take part.
"""

import asyncio
import multiprocessing
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.report import Report
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import Engine
from serve.engines.remote.client import RemoteEngine
from serve.engines.remote.server import EngineServer
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings

STREAMS = 32
STEADY = SimulatedSettings(latency=FixedLatencySettings(decode_step_s=0.01))
BURST = SimulatedSettings(latency=FixedLatencySettings())
ROUNDS = 3


@dataclass
class Reading:
    """What the readers of one run saw."""

    first_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


@asynccontextmanager
async def direct(settings: SimulatedSettings) -> AsyncIterator[tuple[Engine, int | None]]:
    """An engine in this process."""
    engine = SimulatedEngine(settings)
    await engine.start()
    yield engine, None
    await engine.stop()


@asynccontextmanager
async def remote(settings: SimulatedSettings) -> AsyncIterator[tuple[Engine, int | None]]:
    """The same engine in another process."""
    directory = Path(tempfile.mkdtemp(prefix="raytrt-"))
    secret = secrets.token_hex(16)
    context = multiprocessing.get_context("spawn")
    listens = context.Event()
    process = context.Process(target=_host, args=(settings, directory / "engine", secret, listens), daemon=True)
    process.start()
    await asyncio.to_thread(listens.wait, 60)
    engine = RemoteEngine(directory / "engine", secret)
    await engine.start()
    yield engine, process.pid
    await engine.stop()
    await asyncio.to_thread(process.join, 10)
    shutil.rmtree(directory, ignore_errors=True)


def _host(settings: SimulatedSettings, path: Path, secret: str, listens: "multiprocessing.synchronize.Event") -> None:
    async def serve() -> None:
        server = EngineServer(SimulatedEngine(settings), path, secret)
        await server.listen()
        listens.set()
        await server.run()

    asyncio.run(serve())


async def read(engine: Engine, pid: int | None, streams: int, tokens: int) -> Reading:
    """Read so many streams at once."""
    reading = Reading()

    async def one(number: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
        prompt = pack_tokens(range(number, number + 64))
        begin_s = time.monotonic()
        async for delta in engine.generate(GenerateRequest(secrets.token_hex(8), "m", prompt, sampling)):
            now_s = time.monotonic()
            if delta.prefill is not None:
                reading.first_s.append(now_s - begin_s)
            else:
                reading.late_s.append(now_s - delta.emitted_s)
            reading.tokens += len(delta.token_ids)

    processes = [psutil.Process(pid) for pid in (os.getpid(), pid) if pid is not None]
    cpu_s = [sum(process.cpu_times()[:2]) for process in processes]
    begin_s = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(streams)))
    reading.wall_s = time.monotonic() - begin_s
    reading.cpu_s = sum(sum(process.cpu_times()[:2]) - before for process, before in zip(processes, cpu_s, strict=True))
    return reading


async def measure(settings: SimulatedSettings, streams: int, tokens: int) -> tuple[list[Reading], list[Reading]]:
    """Read both engines in turn, several times, so that a busy moment of the machine hits both."""
    found: tuple[list[Reading], list[Reading]] = ([], [])
    async with direct(settings) as here, remote(settings) as there:
        for engine, pid in (here, there):
            await read(engine, pid, streams, 8)  # warm
        for _ in range(ROUNDS):
            for (engine, pid), readings in zip((here, there), found, strict=True):
                readings.append(await read(engine, pid, streams, tokens))
    return found


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def best(readings: list[Reading], figure: Callable[[Reading], float]) -> float:
    """Return the least of a figure over the rounds: what the code costs, not what else the machine does."""
    return min(map(figure, readings))


def pooled(readings: list[Reading], which: Callable[[Reading], list[float]]) -> list[float]:
    """Return the times of all rounds."""
    return [value for reading in readings for value in which(reading)]


async def run() -> Report:
    """Measure everything."""
    report, load = Report("remote_engine", "python -m benchmarks.remote_engine"), os.getloadavg()[0]
    here, there = await measure(STEADY, STREAMS, 300)
    for percent in (50, 99):
        ours = percentile(pooled(there, lambda reading: reading.late_s), percent)
        base = percentile(pooled(here, lambda reading: reading.late_s), percent)
        report.add(f"added per token, {STREAMS} streams at 100 tokens/s, p{percent}", (ours - base) * 1e3, "ms")
    cpu = best(there, lambda reading: reading.cpu_s / reading.tokens)
    base = best(here, lambda reading: reading.cpu_s / reading.tokens)
    report.add("CPU of both processes per 1,000 tokens at that load", cpu * 1e3, "s")
    report.add("over the engine alone", cpu / base, "x")
    here, there = await measure(STEADY, 1, 20)
    ours = statistics.median(pooled(there, lambda reading: reading.first_s))
    base = statistics.median(pooled(here, lambda reading: reading.first_s))
    report.add("added to the first token, 1 stream, p50", (ours - base) * 1e3, "ms")
    here, there = await measure(BURST, STREAMS, 3000)
    ours = 1 / best(there, lambda reading: reading.wall_s / reading.tokens)
    base = 1 / best(here, lambda reading: reading.wall_s / reading.tokens)
    report.add(f"tokens through one socket, {STREAMS} streams as fast as they come", ours, "tokens/s")
    report.add("over the engine alone, which has one process less", ours / base, "x")
    report.note(f"Load average of the machine before the run: {load:.1f}.")
    report.note("The simulated engine has no model: its own cost is far below that of any engine that computes.")
    return report


def main() -> None:
    """Run from the command line."""
    asyncio.run(run()).finish()


if __name__ == "__main__":
    main()
