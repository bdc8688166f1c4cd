"""How fast a gateway takes in what replicas publish: `python -m benchmarks.event_plane`, a minute.

Replicas publish KV events from processes of their own through the production publisher. One gateway process hears all
of them through the production subscriber, and applies everything to the production router. A block counts once for
each change. How late a timer of the gateway's event loop fires is what a token that is to be streamed would wait;
on a machine with few cores that includes the other processes' time.
"""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from benchmarks.report import Figure, Report, percentile
from serve.core.kv_events import KvEvent, KvEventBatch, KvLedger, KvRemoved, KvStored
from serve.core.routing.load import LoadReport
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.router import Router
from serve.engines.protocol import EngineInfo, EngineStats
from serve.router.publisher import EventPublisher
from serve.router.subscriber import EventSubscriber

HOST = "127.0.0.1"
TOKENS_PER_BLOCK = 32
REPLICAS = 4
CACHE_BLOCKS = 40_000  # of each of them
CHAIN = 64  # blocks stored or removed at once: a chunk of a prompt
OFFERED_PER_S = 300_000  # changes of blocks, of all replicas together
WARM_UP_S, STREAM_S = 1.0, 4.0
ROUNDS = 3
LARGE_BLOCKS = 1_000_000
_PACE_S = 0.002
_TIMER_S = 0.001
_MAX_BURST = 10_000.0


@dataclass
class _Times:
    """What was seen of the gateway.

    Attributes:
        blocks: Changes applied.
        wall_s, cpu_s: Meanwhile.
        lost_messages: Published, and dropped on the way.
        late_s: How late the timer of the event loop was, each time.
    """

    blocks: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    lost_messages: int = 0
    late_s: list[float] = field(default_factory=list)


class _Churn:
    """An engine of which only the cache is real: it stores chains and evicts the oldest."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.info = EngineInfo("churn", 131_072, 1000, TOKENS_PER_BLOCK, blocks, "none")
        self._ledger = KvLedger()
        self._held = blocks // CHAIN
        words = np.random.default_rng(seed).integers(0, 1 << 63, (2 * self._held, CHAIN)).tolist()
        self._chains = [tuple(chain) for chain in words]
        self._next = self._held
        self._ledger.record([KvStored(chain, 0) for chain in self._chains[: self._held]])

    def stats(self) -> EngineStats:
        """Return a load that never changes."""
        return EngineStats(total_blocks=self.info.total_blocks)

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content, as an engine does."""
        return self._ledger.read()

    def step(self) -> int:
        """Change as much as a step with a long prompt does; return how many blocks."""
        stored = self._chains[self._next % len(self._chains)]
        evicted = self._chains[(self._next - self._held) % len(self._chains)]
        self._next += 1
        self._ledger.record([KvStored(stored, 0), KvRemoved(evicted)])
        return 2 * CHAIN


class _Gateway:
    """A sink that is the production router."""

    def __init__(self) -> None:
        self.router = Router(PredictivePolicy(), TOKENS_PER_BLOCK)

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        """Hand on."""
        self.router.apply(replica_id, events)

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        """Hand on."""
        self.router.report(replica_id, report, time.monotonic(), new_epoch=new_epoch)

    def connected(self, replica_id: str) -> None:
        """Nothing depends on it here."""

    def lost(self, replica_id: str) -> None:
        """Nothing depends on it here."""


def measure() -> list[Figure]:
    """Return all figures."""
    # The best of some rounds: others use the machine, too.
    stream = max((uvloop.run(_stream()) for _ in range(ROUNDS)), key=lambda times: times.blocks / times.wall_s)
    whole = min((uvloop.run(_snapshot()) for _ in range(ROUNDS)), key=lambda times: times.wall_s)
    rate = stream.blocks / stream.wall_s
    return [
        Figure(f"events applied, {REPLICAS} replicas through ZMQ, one gateway process", rate, "blocks/s", ">= 200000"),
        Figure("processor time of the gateway, for a million of them", 1e6 * stream.cpu_s / stream.blocks, "s"),
        Figure("share of a core that it took", stream.cpu_s / stream.wall_s, "share"),
        Figure("messages that it lost", stream.lost_messages, "messages"),
        Figure("lateness of its event loop meanwhile, p99", 1e3 * percentile(stream.late_s, 0.99), "ms"),
        Figure(f"snapshot of {LARGE_BLOCKS:,} blocks, asked for to applied", whole.wall_s, "s"),
        Figure("lateness of the gateway's event loop meanwhile, p99", 1e3 * percentile(whole.late_s, 0.99), "ms"),
        Figure("the same, longest", 1e3 * max(whole.late_s), "ms"),
    ]


async def _stream() -> _Times:
    """Hear several replicas whose caches change all the time."""
    jobs = [(number, CACHE_BLOCKS, OFFERED_PER_S / REPLICAS) for number in range(REPLICAS)]
    async with _replicas(jobs) as pipes, _listening(pipes) as subscriber:
        await asyncio.sleep(WARM_UP_S)
        times = _Times()
        counts, watch = subscriber.counts, asyncio.ensure_future(_watch(times.late_s))
        blocks, lost = counts.blocks, counts.lost_messages
        began_s, cpu_s = time.monotonic(), time.process_time()
        await asyncio.sleep(STREAM_S)
        times.wall_s, times.cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
        times.blocks, times.lost_messages = counts.blocks - blocks, counts.lost_messages - lost
        watch.cancel()
        return times


async def _snapshot() -> _Times:
    """Hear a replica with a large cache for the first time."""
    async with _replicas([(0, LARGE_BLOCKS, 0.0)]) as pipes:
        times = _Times()
        watch = asyncio.ensure_future(_watch(times.late_s))
        began_s = time.monotonic()
        async with _listening(pipes) as subscriber:
            while subscriber.counts.blocks < LARGE_BLOCKS // CHAIN * CHAIN:  # noqa: ASYNC110  # nobody announces it
                await asyncio.sleep(_TIMER_S)
            times.wall_s = time.monotonic() - began_s
            watch.cancel()
        return times


@asynccontextmanager
async def _listening(pipes: list[Connection]) -> AsyncIterator[EventSubscriber]:
    gateway = _Gateway()
    subscriber = EventSubscriber(gateway)
    for number, pipe in enumerate(pipes):
        address = pipe.recv()
        gateway.router.add(f"replica-{number}", time.monotonic())
        subscriber.listen(f"replica-{number}", address)
        pipe.send("go")
    yield subscriber
    subscriber.close()


async def _watch(late_s: list[float]) -> None:
    while True:
        due_s = time.monotonic() + _TIMER_S
        await asyncio.sleep(_TIMER_S)
        late_s.append(time.monotonic() - due_s)


@asynccontextmanager
async def _replicas(jobs: list[tuple[int, int, float]]) -> AsyncIterator[list[Connection]]:
    """Start replicas, each given by number, size of its cache and changes of blocks a second."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_replica, args=(*job, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        await asyncio.to_thread(pipe.poll, 120)  # it has something to say: its address
    yield pipes
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        await asyncio.to_thread(process.join, 20)


def _replica(number: int, blocks: int, blocks_per_s: float, pipe: Connection) -> None:
    async def serve() -> None:
        engine = _Churn(number, blocks)
        publisher = EventPublisher(f"replica-{number}", HOST, engine)
        await publisher.start()
        pipe.send(publisher.address)
        await asyncio.to_thread(pipe.recv)
        due, last_s = 0.0, time.monotonic()
        while not pipe.poll():
            now_s = time.monotonic()
            due = min(
                due + (now_s - last_s) * blocks_per_s, _MAX_BURST
            )  # what was missed for longer is not made up for
            last_s = now_s
            while due > 0.0:
                due -= engine.step()
            await asyncio.sleep(_PACE_S)
        await publisher.stop()

    uvloop.run(serve())


def main() -> None:
    """Measure and write the report."""
    report = Report("event_plane", "python -m benchmarks.event_plane")
    for figure in measure():
        report.add(figure.name, figure.value, figure.unit, figure.hold)
    report.finish()


if __name__ == "__main__":
    main()
