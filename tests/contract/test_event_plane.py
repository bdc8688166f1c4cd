"""The event plane between publishers and subscribers of this process, over real sockets, on both event loops."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import psutil
import pytest
import uvloop
import zmq

from serve.core.kv_events import KvEventBatch, KvLedger, KvRemoved, KvStored
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.core.routing.request import route_id
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.errors import ConfigError, EngineDead
from serve.router.binding import bind
from serve.router.publisher import HEARTBEAT_S, MAX_BATCH_BLOCKS, EventPublisher, Source
from serve.router.replica_feed import SLICE_BLOCKS
from serve.router.snapshot_server import MIN_INTERVAL_S
from serve.router.subscriber import SILENT_S, EventSubscriber
from serve.router.wire import (
    METADATA_KEY,
    PLANE_VERSION,
    Hello,
    PlaneAddress,
    SnapshotPart,
    SnapshotRequest,
    decode_answer,
    encode,
)
from tests.unit.router.mirror_sink import MirrorSink

HOST = "127.0.0.1"
NO_ADDRESS_OF_OURS = "192.0.2.1"  # TEST-NET-1 of RFC 5737
Run = Callable[[Coroutine[Any, Any, None]], None]
OpenSocket: TypeAlias = Callable[[int], "zmq.Socket[bytes]"]
both_loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@pytest.fixture
def open_socket() -> Iterator[OpenSocket]:
    """Makes sockets that a test uses itself."""
    context, sockets = zmq.Context(), list[zmq.Socket[bytes]]()

    def open_one(kind: int) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        return sockets[-1]

    yield open_one
    for socket in sockets:
        socket.close(linger=0)
    context.term()


@pytest.fixture(autouse=True)
def _logs_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("serve"), "propagate", True)  # an earlier test may have configured it


class ScriptedEngine:
    """Holds what a test puts in."""

    def __init__(self, *batches: KvStored | KvRemoved) -> None:
        self.ledger = KvLedger()
        self.load = EngineStats(total_blocks=10**6)
        self.info = EngineInfo("scripted", 1000, 100, 32, 10**6, "none")
        self.failures: list[Exception] = []
        if batches:
            self.ledger.record(batches)

    def stats(self) -> EngineStats:
        return self.load

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        async for batch in self.ledger.read():
            yield batch
            if self.failures:
                raise self.failures.pop()


@asynccontextmanager
async def publishing(engine: Source, name: str = "r") -> AsyncIterator[tuple[EventPublisher, PlaneAddress]]:
    publisher = EventPublisher(name, HOST, engine)
    await publisher.start()
    address = publisher.address
    assert address is not None
    try:
        yield publisher, address
    finally:
        await publisher.stop()


@asynccontextmanager
async def gateway(
    *replicas: tuple[str, PlaneAddress], clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[MirrorSink, EventSubscriber]]:
    sink = MirrorSink()
    subscriber = EventSubscriber(sink, clock)
    for name, address in replicas:
        subscriber.listen(name, address)
    try:
        yield sink, subscriber
    finally:
        subscriber.close()


def chain(first: int, blocks: int) -> KvStored:
    return KvStored(tuple(range(first, first + blocks)), 0)


def request_of(name: str, prompt: range, max_tokens: int = 20) -> GenerateRequest:
    return GenerateRequest(name, "m", pack_tokens(prompt), SamplingParams(max_tokens=max_tokens))


async def serve(engine: SimulatedEngine, publisher: EventPublisher, request: GenerateRequest) -> int:
    """Run a sequence as a replica does; return how many tokens it brought."""
    tokens = 0
    publisher.accepted(request)
    try:
        async for delta in engine.generate(request):
            publisher.delta(request, delta)
            tokens += len(delta.token_ids)
    finally:
        publisher.ended(request)
    return tokens


@both_loops
def test_a_gateway_knows_what_an_engine_holds_and_how_busy_it_is(run: Run) -> None:
    async def scenario() -> None:
        latency = FixedLatencySettings(decode_step_s=0.001)
        engine = SimulatedEngine(SimulatedSettings(latency=latency, total_blocks=300, context_tokens=2000))
        await engine.start()
        async with publishing(engine) as (publisher, address), gateway(("r", address)) as (sink, _):
            requests = [request_of(f"q{i}", range(100 * i, 100 * i + 600)) for i in range(40)]  # more than fit
            assert await asyncio.gather(*(serve(engine, publisher, request) for request in requests)) == [20] * 40
            await sink.until(lambda: sink.content["r"].keys() == engine.cache_content())
            assert engine.cache_content()
            await sink.until(lambda: sink.reports["r"][-1][0].generated_tokens == 800)
            reports = [report for report, _ in sink.reports["r"]]
            assert sorted(name for report in reports for name in report.accepted) == sorted(
                route_id(request.request_id) for request in requests
            )
            assert max(report.running for report in reports) > 0
            last = reports[-1]
            assert (last.running, last.waiting, last.committed_blocks, last.queued_prefill_tokens) == (0, 0, 0, 0)
            assert last.steps == engine.stats().steps
        await engine.stop()

    run(scenario())


@both_loops
def test_a_gateway_that_comes_late_gets_a_snapshot(run: Run) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(chain(1, 5000), KvStored((7,), 6, tier=1))
        async with publishing(engine) as (_, address):
            engine.ledger.record([KvRemoved((1, 2))])
            async with gateway(("r", address)) as (sink, subscriber):
                await sink.until(lambda: len(sink.content.get("r", {})) == 4998)
                assert sink.content["r"].keys() == engine.ledger.content()
                assert sink.content["r"][7] == 1
                assert sink.parents["r"][4] == 3
                engine.ledger.record([KvRemoved((3,)), chain(9000, 2)])
                await sink.until(lambda: sink.content["r"].keys() == engine.ledger.content())
                assert subscriber.counts.snapshots == 1
                assert sink.heard == {"r"}

    run(scenario())


@both_loops
def test_a_million_blocks_leave_the_event_loop_to_others(run: Run) -> None:
    async def scenario() -> None:
        blocks = 1_000_000
        engine = ScriptedEngine(*(chain(first, 1000) for first in range(1, blocks, 1000)))
        ticks = 0

        def clock() -> float:
            # Each look at the clock is half a millisecond after the one before, whatever the machine is doing.
            nonlocal ticks
            ticks += 1
            return ticks * 0.0005

        async with publishing(engine) as (_, address), gateway(("r", address), clock=clock) as (sink, subscriber):
            most_at_once = calls = 0
            while len(sink.content.get("r", {})) < blocks:
                await asyncio.sleep(0)
                most_at_once, calls = max(most_at_once, sink.calls - calls), sink.calls
            assert sink.largest <= SLICE_BLOCKS
            assert most_at_once <= 3
            assert subscriber.counts.snapshots == 1

    run(scenario())


async def test_a_burst_through_one_gateway_is_known_to_another_within_100_ms() -> None:
    settings = SimulatedSettings(latency=FixedLatencySettings(prefill_tokens_per_s=1e4, decode_step_s=0.01))
    engine = SimulatedEngine(settings)
    await engine.start()
    delays_s = []
    async with (
        publishing(engine) as (publisher, address),
        gateway(("r", address)) as (one, _),
        gateway(("r", address)) as (other, _),
    ):
        await one.until(lambda: "r" in one.reports)
        await other.until(lambda: "r" in other.reports)
        for burst in range(5):
            requests = [request_of(f"{burst}-{i}", range(100 * i, 100 * i + 500), 2) for i in range(16)]
            names = {route_id(request.request_id) for request in requests}
            start_s = time.monotonic()
            work = asyncio.gather(*(serve(engine, publisher, request) for request in requests))
            for sink in (one, other):
                await sink.until(lambda sink=sink, names=names: names <= accepted(sink))  # type: ignore[misc]
            delays_s.append(time.monotonic() - start_s)
            loads = [report for report, _ in other.reports["r"] if names & set(report.accepted)]
            assert loads[0].running + loads[0].waiting == 16
            assert loads[0].queued_prefill_tokens > 0
            await work
    await engine.stop()
    assert min(delays_s) <= 0.1, delays_s  # the least of them: the machine may have had other things to do


def accepted(sink: MirrorSink) -> set[int]:
    return {name for report, _ in sink.reports.get("r", []) for name in report.accepted}


async def test_load_is_told_when_it_changes_and_now_and_then() -> None:
    engine = ScriptedEngine()
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, _):
        await sink.until(lambda: len(sink.reports.get("r", [])) >= 4)  # heartbeats
        assert len({report for report, _ in sink.reports["r"]}) == 1
        engine.load = EngineStats(waiting=3, total_blocks=10**6)
        await sink.until(lambda: sink.reports["r"][-1][0].waiting == 3, timeout_s=20 * HEARTBEAT_S)


async def test_a_gateway_that_reads_nothing_slows_nobody_and_costs_little(open_socket: OpenSocket) -> None:
    engine = ScriptedEngine()
    stuck = open_socket(zmq.SUB)
    stuck.setsockopt(zmq.RCVHWM, 1)
    stuck.setsockopt(zmq.SUBSCRIBE, b"")
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, _):
        stuck.connect(address.events)
        asker(open_socket, address).send(encode(SnapshotRequest(address.secret, 1)))  # and takes nothing of the answer
        await sink.until(lambda: "r" in sink.reports)
        before = psutil.Process().memory_info().rss
        for number in range(1200):  # 20 MB of messages
            engine.ledger.record([chain(1 << 60, 1900 + number % 7)])
            await asyncio.sleep(0)
        await sink.until(lambda: sink.content["r"].keys() == engine.ledger.content())
        assert psutil.Process().memory_info().rss - before < 12 << 20


async def test_a_gateway_that_takes_its_snapshot_late_gets_all_of_it_and_delays_nobody(open_socket: OpenSocket) -> None:
    blocks = 300_000
    engine = ScriptedEngine(*(chain(first, 1000) for first in range(1, blocks, 1000)))
    async with publishing(engine) as (_, address):
        late, gone = asker(open_socket, address), asker(open_socket, address, b"who leaves")
        for socket in (late, gone):
            socket.send(encode(SnapshotRequest(address.secret, 1)))
        assert isinstance(decode_answer(await receive(gone)), Hello)
        gone.close(linger=0)
        async with gateway(("r", address)) as (sink, _):
            await sink.until(lambda: len(sink.content.get("r", {})) == blocks)
        parts: list[SnapshotPart] = []
        while not parts or len(parts) < parts[0].parts:
            answer = decode_answer(await receive(late))
            if isinstance(answer, SnapshotPart):
                parts.append(answer)
        assert [part.part for part in parts] == list(range(parts[0].parts))
        assert sum(len(part.hashes) for part in parts) == 8 * blocks


def asker(open_socket: OpenSocket, address: PlaneAddress, name: bytes = b"somebody") -> "zmq.Socket[bytes]":
    """Return a socket that asks a replica, of a gateway that the test plays itself."""
    socket = open_socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, name)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.connect(address.snapshots)
    return socket


async def receive(socket: "zmq.Socket[bytes]") -> bytes:
    """Wait for a message, in a thread: these sockets are on no event loop."""
    assert await asyncio.to_thread(socket.poll, 20_000)
    return socket.recv()


async def last_answer(socket: "zmq.Socket[bytes]", request: int) -> list[int]:
    """Read answers until that to `request`; return the numbers of all of them."""
    answers: list[int] = []
    while not answers or answers[-1] != request:
        answer = decode_answer(await receive(socket))
        if isinstance(answer, SnapshotPart):
            answers.append(answer.request)
    return answers


async def test_many_requests_of_one_gateway_get_few_answers_and_the_last_gets_one(open_socket: OpenSocket) -> None:
    async with publishing(ScriptedEngine(chain(1, 10))) as (_, address):
        socket = asker(open_socket, address)
        for number in range(1, 51):
            socket.send(encode(SnapshotRequest(address.secret, number)))
        assert len(await last_answer(socket, 50)) <= 3
        start_s = time.monotonic()
        for number in (51, 52):
            socket.send(encode(SnapshotRequest(address.secret, number)))
            await last_answer(socket, number)
        assert time.monotonic() - start_s >= MIN_INTERVAL_S * 0.9


async def test_who_does_not_know_the_secret_gets_no_answer(open_socket: OpenSocket) -> None:
    async with publishing(ScriptedEngine(chain(1, 10))) as (_, address):
        socket = asker(open_socket, address)
        socket.send(encode(SnapshotRequest("guessed", 1)))
        socket.send(b"")
        socket.send(bytes([PLANE_VERSION]) + b"nonsense")
        socket.send_multipart([b"two", b"frames"])
        socket.send(encode(SnapshotRequest(address.secret, 2)))
        hello = decode_answer(await receive(socket))
        assert isinstance(hello, Hello)
        assert hello.facts.engine == "scripted"
        assert await last_answer(socket, 2) == [2]


async def test_another_version_is_ignored_and_named_once(
    open_socket: OpenSocket, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = open_socket(zmq.XPUB)
    endpoint = bind(stranger, HOST)
    async with publishing(ScriptedEngine(chain(1, 10))) as (_, address):
        strange = PlaneAddress(endpoint, address.snapshots, "", 1, address.facts)
        async with gateway(("r", address), ("strange", strange)) as (sink, subscriber):
            await receive(stranger)  # the subscription
            for _ in range(3):
                stranger.send(bytes([PLANE_VERSION + 1, 1, 2, 3]))
            stranger.send(bytes([PLANE_VERSION, 0xC1]))  # of this version, and nonsense
            await sink.until(lambda: subscriber.counts.refused == 4 and len(sink.content.get("r", {})) == 10)
        socket = asker(open_socket, address)
        for _ in range(3):
            socket.send(bytes([PLANE_VERSION + 2, 1]))
        socket.send(encode(SnapshotRequest(address.secret, 9)))
        await last_answer(socket, 9)
    told = [record.message for record in caplog.records if "speaks version" in record.message]
    assert len(told) == 2
    for line, version in zip(told, (PLANE_VERSION + 1, PLANE_VERSION + 2), strict=True):
        assert f"speaks version {version} " in line
        assert f"version {PLANE_VERSION}:" in line


async def test_a_batch_that_is_too_large_to_publish_comes_as_a_snapshot() -> None:
    engine = ScriptedEngine(chain(1, 5))
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, subscriber):
        await sink.until(lambda: len(sink.content.get("r", {})) == 5)
        engine.ledger.record([chain(100, MAX_BATCH_BLOCKS + 1)])
        await sink.until(lambda: sink.content["r"].keys() == engine.ledger.content())
        assert subscriber.counts.snapshots == 2


async def test_a_reader_that_fails_is_opened_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(chain(1, 5))
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, _):
        await sink.until(lambda: len(sink.content.get("r", {})) == 5)
        engine.failures.append(OSError("a pipe broke"))
        engine.ledger.record([chain(10, 1)])
        engine.ledger.record([chain(20, 1)])
        await sink.until(lambda: sink.content["r"].keys() == {1, 2, 3, 4, 5, 10, 20})
        assert "a pipe broke" in caplog.text


async def test_an_engine_that_was_started_anew_is_a_new_epoch() -> None:
    engine = ScriptedEngine(chain(1, 5))
    for number in range(50):
        engine.ledger.record([chain(100 + number, 1)])
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, _):
        await sink.until(lambda: len(sink.content.get("r", {})) == 55)
        engine.ledger, former = KvLedger(), engine.ledger
        engine.ledger.record([chain(3, 1)])
        engine.failures.append(OSError("the engine is gone"))
        former.record([chain(9, 1)])
        await sink.until(lambda: sink.content["r"].keys() == {3})
        await sink.until(lambda: any(new_epoch for _, new_epoch in sink.reports["r"]))
        engine.ledger.record([chain(4, 1)])
        await sink.until(lambda: sink.content["r"].keys() == {3, 4})


async def test_the_death_of_the_engine_ends_its_events_and_nothing_else() -> None:
    engine = ScriptedEngine(chain(1, 5))
    async with publishing(engine) as (_, address), gateway(("r", address)) as (sink, _):
        await sink.until(lambda: len(sink.content.get("r", {})) == 5 and "r" in sink.reports)
        engine.failures.append(EngineDead("a rank was lost"))
        engine.ledger.record([chain(10, 1)])
        known = len(sink.reports["r"])
        await sink.until(lambda: len(sink.reports["r"]) >= known + 2)


async def test_a_silent_replica_is_lost_until_it_is_heard_again(open_socket: OpenSocket) -> None:
    ahead_s = 0.0
    relay, source = open_socket(zmq.PUB), open_socket(zmq.SUB)
    source.setsockopt(zmq.SUBSCRIBE, b"")
    async with publishing(ScriptedEngine(chain(1, 5))) as (_, address):
        source.connect(address.events)
        relayed = PlaneAddress(bind(relay, HOST), address.snapshots, address.secret, address.epoch, address.facts)
        async with gateway(("r", relayed), clock=lambda: time.monotonic() + ahead_s) as (sink, _):
            await sink.until(lambda: len(sink.content.get("r", {})) == 5)
            assert sink.heard == {"r"}
            ahead_s = SILENT_S + 1.0
            await sink.until(lambda: not sink.heard)
            assert len(sink.content["r"]) == 5
            relay.send(await receive(source))
            await sink.until(lambda: sink.heard == {"r"})


async def test_a_sink_that_fails_gets_all_of_it_again(caplog: pytest.LogCaptureFixture) -> None:

    class Fragile(MirrorSink):
        failures = 0

        def apply(self, replica_id: str, events: Any) -> None:
            super().apply(replica_id, events)
            if self.failures:
                self.failures -= 1
                self.content[replica_id].clear()
                raise KeyError("lost it")

    engine, sink = ScriptedEngine(chain(1, 3000)), Fragile()
    async with publishing(engine) as (_, address):
        subscriber = EventSubscriber(sink)
        subscriber.listen("r", address)
        await sink.until(lambda: len(sink.content.get("r", {})) == 3000)
        sink.failures = 1
        engine.ledger.record([chain(5000, 1)])
        await sink.until(lambda: sink.content["r"].keys() == engine.ledger.content())
        sink.failures = 2
        engine.ledger.record([chain(6000, 3000)])
        await sink.until(lambda: sink.content["r"].keys() == engine.ledger.content())
        subscriber.close()
    assert "lost it" in caplog.text


async def test_replicas_come_and_go_by_their_names() -> None:
    one, other = ScriptedEngine(chain(1, 5)), ScriptedEngine(chain(100, 5))
    async with (
        publishing(one, "one") as (_, first),
        publishing(other, "other") as (_, second),
        gateway(("one", first), ("other", second)) as (sink, subscriber),
    ):
        await sink.until(lambda: len(sink.content) == 2 and all(len(held) == 5 for held in sink.content.values()))
        subscriber.forget("other")
        subscriber.forget("unknown")
        sink.content["other"].clear()
        other.ledger.record([chain(200, 1)])
        one.ledger.record([chain(300, 1)])
        await sink.until(lambda: 300 in sink.content["one"])
        assert not sink.content["other"]
        subscriber.listen("other", second)
        await sink.until(lambda: len(sink.content["other"]) == 6)


async def test_two_names_at_one_address_are_told_apart() -> None:
    engine = ScriptedEngine(chain(1, 5))
    async with (
        publishing(engine, "new") as (_, address),
        gateway(("old", address), ("new", address)) as (sink, subscriber),
    ):
        await sink.until(lambda: len(sink.content.get("new", {})) == 5)
        subscriber.forget("old")
        engine.ledger.record([chain(10, 1)])
        await sink.until(lambda: 10 in sink.content["new"])
        assert "old" not in sink.content


async def test_a_node_whose_address_cannot_be_bound_serves_without(
    open_socket: OpenSocket, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=NO_ADDRESS_OF_OURS):
        bind(open_socket(zmq.PUB), NO_ADDRESS_OF_OURS)
    publisher = EventPublisher("r", NO_ADDRESS_OF_OURS, ScriptedEngine())
    await publisher.start()
    assert NO_ADDRESS_OF_OURS in caplog.text
    assert publisher.address is None
    assert METADATA_KEY not in publisher.metadata()
    assert publisher.metadata()["tokens_per_block"] == 32
    request = request_of("a", range(10))
    publisher.accepted(request)
    publisher.ended(request)
    await publisher.stop()


@both_loops
def test_nothing_is_left_open(run: Run) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(*(chain(first, 1000) for first in range(0, 200_000, 1000)))
        async with publishing(engine) as (publisher, address), gateway(("r", address)) as (sink, subscriber):
            await sink.until(lambda: bool(sink.calls))  # in the middle of a snapshot
            subscriber.listen("nobody", PlaneAddress("tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "", 1, address.facts))
            subscriber.listen("nonsense", PlaneAddress("x", "y", "", 1, address.facts))
            subscriber.close()
            subscriber.close()
            await publisher.stop()
            await publisher.stop()
            publisher.accepted(request_of("late", range(5)))
        await EventPublisher("never started", HOST, engine).stop()
        EventSubscriber(sink).close()

    run(scenario())  # what a process opens once
    before = psutil.Process().num_fds()
    run(scenario())
    assert psutil.Process().num_fds() <= before
