"""Server and client of a remote engine, over a real socket on one event loop."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.core.framing import FrameReader
from serve.core.kv_events import KvSnapshot, KvStored
from serve.core.request import FinishReason, GenerateRequest, TokenDelta, pack_tokens
from serve.engines.protocol import Engine
from serve.engines.remote.client import RemoteEngine
from serve.engines.remote.server import EngineServer
from serve.engines.remote.wire import (
    Command,
    Commands,
    Follow,
    Generate,
    Hello,
    Report,
    Start,
    Started,
    decode_report,
    pack,
)
from serve.errors import BundleMismatch, ConfigError, EngineDead, Overloaded, RayTRTError, RequestError, StreamLost
from tests.contract.engine_conformance_case import KvMirror
from tests.unit.engines.remote.scripted_engine import INFO, ScriptedEngine

SECRET = "s3cret"


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    directory = tmp_path / "s"
    directory.mkdir(mode=0o700)
    return directory / "e"


def request(name: str = "r", prompt: int = 3) -> GenerateRequest:
    return GenerateRequest(name, "m", pack_tokens(range(prompt)))


@asynccontextmanager
async def hosted(engine: Engine, path: Path, **options: Any) -> AsyncIterator["asyncio.Task[None]"]:
    """Serve an engine; the task ends when its replica has left."""
    server = EngineServer(engine, path, SECRET, **options)
    await server.listen()
    running = asyncio.ensure_future(server.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def joined(
    engine: ScriptedEngine, path: Path, **options: Any
) -> AsyncIterator[tuple[RemoteEngine, "asyncio.Task[None]"]]:
    """Serve an engine and start it from the other end."""
    async with hosted(engine, path) as running:
        remote = RemoteEngine(path, SECRET, **options)
        await remote.start()
        yield remote, running
        await remote.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the other end does, which nobody announces."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.001)


class RawReplica:
    """A replica that speaks frame by frame, and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()
        self._waiting: list[Report] = []

    @classmethod
    async def connect(cls, path: Path, hello: Hello | None = None) -> "RawReplica":
        replica = cls(*await asyncio.open_unix_connection(str(path), limit=1024))
        replica._writer.write(pack(hello or Hello(SECRET, "test")))
        return replica

    def send(self, *commands: Command) -> None:
        self._writer.write(pack(Commands(commands)))

    async def next(self) -> Report | None:
        """Read the next report; None at the end of the connection."""
        while not self._waiting:
            data = await self._reader.read(2**16)
            if not data:
                return None
            self._waiting += [decode_report(body) for body in self._frames.feed(data)]
        return self._waiting.pop(0)

    async def wait_for(self, condition: Callable[[Report], object]) -> Report:
        async with asyncio.timeout(30):
            while True:
                report = await self.next()
                assert report is not None, "the connection ended"
                if condition(report):
                    return report

    def close(self) -> None:
        self._writer.close()


async def test_a_step_of_all_sequences_is_one_frame(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with hosted(engine, socket_path):
        replica = await RawReplica.connect(socket_path)
        replica.send(Start(), *(Generate(number, request(str(number))) for number in range(1, 33)))
        started = await replica.wait_for(lambda report: report.answer)
        assert started.answer == Started(INFO)
        await until(lambda: len(engine.sequences) == 32)
        for step in range(3):
            engine.step(finish=step == 2)
            report = await replica.wait_for(lambda report: report.deltas)
            assert [number for number, _ in report.deltas] == list(range(1, 33))
            assert report.taken == 32
        replica.close()


async def test_what_the_engine_says_reaches_the_other_end(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path) as (remote, _):
        assert remote.info == INFO
        remote.check_health()
        stream = remote.generate(request())
        reading = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(engine.sequences))
        engine.step()
        assert (await reading).token_ids == (1,)
        assert remote.stats() == engine.stats()
        await stream.aclose()
        await until(lambda: engine.closed == ["r"])
        await until(lambda: remote.stats().running == 0)


async def test_a_request_on_its_way_counts_as_waiting(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path) as (remote, _):
        reading = asyncio.ensure_future(anext(remote.generate(request())))
        await asyncio.sleep(0)
        assert remote.stats().waiting == 1
        await until(lambda: remote.stats().running == 1)
        assert remote.stats().waiting == 0
        engine.step()
        await reading


async def test_closing_a_stream_closes_it_at_the_other_end(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path) as (remote, _):
        streams = [remote.generate(request(name)) for name in "abc"]
        reading = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: len(engine.sequences) == 3)
        engine.step()
        await asyncio.gather(*reading)
        await streams[1].aclose()
        await until(lambda: engine.closed == ["b"])
        engine.step(finish=True)
        for stream in (streams[0], streams[2]):
            rest = [delta async for delta in stream]
            assert [delta.finish_reason for delta in rest] == [FinishReason.LENGTH]
        assert engine.closed == ["b", "a", "c"]


async def test_a_request_id_comes_again_before_the_engine_has_let_go_of_it(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path) as (remote, _):
        first = remote.generate(request("same"))
        reading = asyncio.ensure_future(anext(first))
        await until(lambda: bool(engine.sequences))
        with pytest.raises(RequestError, match="in flight"):
            await anext(remote.generate(request("same")))
        engine.step()
        await reading
        engine.may_close.clear()  # letting go takes its time
        await first.aclose()
        again = asyncio.ensure_future(anext(remote.generate(request("same"))))
        await until(lambda: remote.stats().waiting == 0)
        engine.may_close.set()
        await until(lambda: engine.closed == ["same"] and "same" in engine.sequences)
        engine.step()
        assert (await again).token_ids == (2,)


@pytest.mark.parametrize(
    "error", [ConfigError("no such backend"), BundleMismatch("sm_90, not sm_80"), EngineDead("out of memory")], ids=repr
)
async def test_an_error_of_the_start_keeps_its_class(error: RayTRTError, socket_path: Path) -> None:
    engine = ScriptedEngine(start_error=error)
    deaths: list[str] = []
    async with hosted(engine, socket_path) as running:
        remote = RemoteEngine(socket_path, SECRET, on_death=deaths.append)
        with pytest.raises(type(error), match=str(error)):
            await remote.start()
        with pytest.raises(EngineDead, match=str(error)):
            remote.check_health()
        await remote.stop()
        await running
    assert engine.stopped.is_set()
    assert deaths == []


async def test_a_crash_of_the_start_is_told(socket_path: Path) -> None:
    async with hosted(ScriptedEngine(start_error=ImportError("libcudart.so.13")), socket_path):
        remote = RemoteEngine(socket_path, SECRET)
        with pytest.raises(EngineDead, match=r"ImportError: libcudart\.so\.13"):
            await remote.start()
        await remote.stop()


async def test_a_start_that_nobody_waits_for_ends_the_host(socket_path: Path) -> None:
    engine = ScriptedEngine()
    engine.may_start.clear()
    async with hosted(engine, socket_path) as running:
        remote = RemoteEngine(socket_path, SECRET)
        starting = asyncio.ensure_future(remote.start())
        await until(lambda: remote.stats() == engine.stats())  # it has been heard
        starting.cancel()
        await running
        assert engine.stopped.is_set()
        assert starting.cancelled()


async def test_a_stop_ends_a_start(socket_path: Path) -> None:
    engine = ScriptedEngine()
    engine.may_start.clear()
    async with hosted(engine, socket_path) as running:
        remote = RemoteEngine(socket_path, SECRET)
        starting = asyncio.ensure_future(remote.start())
        await until(lambda: remote.stats() == engine.stats())
        await remote.stop()
        with pytest.raises(EngineDead, match="stopped"):
            await starting
        await running
        assert engine.stopped.is_set()


async def streams_of(remote: RemoteEngine, engine: ScriptedEngine) -> list[AsyncGenerator[TokenDelta, None]]:
    """Return three streams that have begun."""
    streams = [remote.generate(request(name)) for name in "abc"]
    reading = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await until(lambda: len(engine.sequences) == 3)
    engine.step()
    await asyncio.gather(*reading)
    return streams


async def check_all_dead(
    remote: RemoteEngine, streams: list[AsyncGenerator[TokenDelta, None]], kv: AsyncGenerator[Any, None], reason: str
) -> None:
    for stream in streams:
        with pytest.raises(EngineDead, match=reason):
            await anext(stream)
    with pytest.raises(EngineDead, match=reason):
        await anext(kv)
    with pytest.raises(EngineDead, match=reason):
        remote.check_health()
    with pytest.raises(EngineDead, match=reason):
        await anext(remote.generate(request("late")))
    stats = remote.stats()
    assert (stats.running, stats.waiting, stats.used_blocks, stats.total_blocks) == (0, 0, 0, 256)


async def test_a_lost_host_ends_every_stream_at_once(socket_path: Path) -> None:
    engine, deaths = ScriptedEngine(), list[str]()
    async with joined(engine, socket_path, on_death=deaths.append) as (remote, running):
        streams, kv = await streams_of(remote, engine), remote.kv_events()
        await anext(kv)
        assert remote._link is not None
        assert remote._link._transport is not None
        remote._link._transport.abort()  # as the kernel does when the other process dies
        await check_all_dead(remote, streams, kv, "is gone")
        await running
    assert engine.stopped.is_set()
    assert len(deaths) == 1


async def test_an_engine_that_says_it_is_dead_ends_streams_that_hang(socket_path: Path) -> None:
    engine, deaths = ScriptedEngine(), list[str]()
    async with joined(engine, socket_path, on_death=deaths.append) as (remote, _):
        streams, kv = await streams_of(remote, engine), remote.kv_events()
        await anext(kv)
        engine.sick = "rank 1 is gone"  # and its generators wait for ever
        await check_all_dead(remote, streams, kv, "rank 1 is gone")
    assert deaths == ["rank 1 is gone"]


async def test_a_stop_is_no_death(socket_path: Path) -> None:
    engine, deaths = ScriptedEngine(), list[str]()
    async with joined(engine, socket_path, on_death=deaths.append) as (remote, running):
        streams, kv = await streams_of(remote, engine), remote.kv_events()
        await anext(kv)
        await remote.stop()
        await check_all_dead(remote, streams, kv, "stopped")
        await running
        await remote.stop()
    assert deaths == []
    assert engine.closed == ["a", "b", "c"]


async def test_beats_come_while_nothing_else_does(socket_path: Path) -> None:
    beats: asyncio.Queue[None] = asyncio.Queue()
    async with joined(ScriptedEngine(), socket_path, on_beat=lambda: beats.put_nowait(None)):
        async with asyncio.timeout(30):
            for _ in range(3):
                await beats.get()


async def test_a_stop_that_is_not_answered_is_given_up(socket_path: Path) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # to the end, without a word
        writer.close()
        left.set()

    left = asyncio.Event()
    server = await asyncio.start_unix_server(accept, str(socket_path))
    remote = RemoteEngine(socket_path, SECRET, stop_timeout_s=0.01)
    starting = asyncio.ensure_future(remote.start())
    await until(lambda: remote._starting is not None)
    async with asyncio.timeout(30):
        await remote.stop()
    with pytest.raises(EngineDead, match="stopped"):
        await starting
    await left.wait()
    server.close()


async def test_a_host_that_does_not_read_gets_no_more_requests(socket_path: Path) -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pack(Report(answer=Started(INFO))))
        closing.append(writer)

    closing: list[asyncio.StreamWriter] = []
    server = await asyncio.start_unix_server(accept, str(socket_path), limit=1024)
    remote = RemoteEngine(socket_path, SECRET, max_unsent_bytes=10_000_000, stop_timeout_s=0.01)
    await remote.start()
    sent = [remote.generate(request(str(number), prompt=500_000)) for number in range(40)]
    waiting = {asyncio.ensure_future(anext(stream)) for stream in sent}
    refused, _ = await asyncio.wait(waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    assert 0 < len(refused) < 40
    await remote.stop()
    await asyncio.gather(*waiting, return_exceptions=True)
    closing[0].transport.abort()
    await asyncio.sleep(0)
    server.close()


async def test_a_replica_that_does_not_read_gets_merged_deltas_later(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with hosted(engine, socket_path):
        replica = await RawReplica.connect(socket_path)
        replica.send(Start(), Generate(1, request()))
        await until(lambda: bool(engine.sequences))
        steps, long = 40, tuple(range(100_000, 150_000))
        for step in range(steps):  # far more than socket and link hold
            reason = FinishReason.LENGTH if step == steps - 1 else None
            engine.sequences["r"].put_nowait(TokenDelta((step, *long), reason))
            await asyncio.sleep(0)
        await until(lambda: engine.closed == ["r"])
        tokens: list[int] = []
        frames = 0
        while True:
            report = await replica.wait_for(lambda report: report.deltas)
            frames += 1
            tokens += report.deltas[0][1].token_ids
            if report.deltas[0][1].finish_reason is not None:
                break
        assert tokens == [token for step in range(steps) for token in (step, *long)]
        assert frames < steps / 2
        replica.close()


async def test_a_replica_that_does_not_read_gets_a_snapshot_later(socket_path: Path) -> None:
    engine = ScriptedEngine(kv_lag=8)
    async with hosted(engine, socket_path):
        replica = await RawReplica.connect(socket_path)
        replica.send(Start(), Follow(1))
        mirror = KvMirror()
        mirror.apply((await replica.wait_for(lambda report: report.kv)).kv[0][1])
        for batch in range(40):
            engine.ledger.record(_wide(batch))
            await asyncio.sleep(0)
        snapshots = 0
        while mirror.content() != engine.ledger.content():
            for _, told in (await replica.wait_for(lambda report: report.kv)).kv:
                mirror.apply(told)
                snapshots += isinstance(told.events[0], KvSnapshot)
        assert snapshots == 1
        replica.close()


def _wide(batch: int) -> list[KvStored]:
    first = 2**62 + batch * 10_000
    return [KvStored(tuple(range(first + 1, first + 10_000)), first)]


async def test_a_consumer_that_falls_behind_gets_a_snapshot(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path, max_kv_lag=4) as (remote, _):
        slow, quick = remote.kv_events(), remote.kv_events()
        mirrors = KvMirror(), KvMirror()
        for feed, mirror in zip((slow, quick), mirrors, strict=True):
            mirror.apply(await anext(feed))
        for block in range(1, 50):
            engine.store(block)
            mirrors[1].apply(await anext(quick))
        assert mirrors[1].content() == frozenset(range(1, 50))
        late = await anext(slow)
        while late.sequence < 49:
            mirrors[0].apply(late)
            late = await anext(slow)
        mirrors[0].apply(late)
        assert mirrors[0].content() == frozenset(range(1, 50))
        engine.store(50)
        mirrors[0].apply(await anext(slow))
        assert mirrors[0].content() == frozenset(range(1, 51))
        await slow.aclose()
        await quick.aclose()
        await until(lambda: not engine.ledger._readers)


async def test_a_stranger_is_turned_away_and_the_replica_still_gets_in(socket_path: Path) -> None:
    async with hosted(ScriptedEngine(), socket_path):
        for hello in (Hello("guess", "x"), Hello("s\u00e9cret", "x")):
            stranger = await RawReplica.connect(socket_path, hello)
            assert await stranger.next() is None
            stranger.close()
        reader, writer = await asyncio.open_unix_connection(str(socket_path))
        writer.write(b"\xff\xff\xff\xff")
        assert await reader.read() == b""
        writer.close()
        remote = RemoteEngine(socket_path, SECRET)
        await remote.start()
        assert not socket_path.exists()  # noqa: ASYNC240  # nobody else can come
        await remote.stop()


async def test_another_release_is_refused_by_name(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with hosted(engine, socket_path) as running:
        replica = await RawReplica.connect(socket_path, Hello(SECRET, "9.8.7", protocol=99))
        replica.send(Start())
        report = await replica.next()
        assert report is not None
        assert "9.8.7 (protocol 99" in str(report.answer)
        assert "ConfigError" in str(report.answer)
        replica.close()
        await running
    assert engine.stopped.is_set()


async def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # noqa: ASYNC240
    with pytest.raises(ConfigError, match="0700"):
        await EngineServer(ScriptedEngine(), tmp_path / "e", SECRET).listen()


async def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="107 bytes"):
        await EngineServer(ScriptedEngine(), deep / "e", SECRET).listen()


async def test_a_host_that_nobody_comes_to_ends(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with hosted(engine, socket_path, connect_timeout_s=0.01) as running:
        await running
    assert engine.stopped.is_set()
    assert not socket_path.exists()  # noqa: ASYNC240


async def test_no_host_is_an_error_that_names_the_socket(socket_path: Path) -> None:
    remote = RemoteEngine(socket_path, SECRET)
    with pytest.raises(EngineDead, match=str(socket_path)):
        await remote.start()
    await remote.stop()


async def test_an_internal_error_of_a_sequence_ends_that_one_only(socket_path: Path) -> None:
    engine = ScriptedEngine()
    async with joined(engine, socket_path) as (remote, _):
        streams = await streams_of(remote, engine)
        engine.sequences["b"].put_nowait(ZeroDivisionError("oops"))
        with pytest.raises(StreamLost, match="ZeroDivisionError: oops"):
            await anext(streams[1])
        engine.step(finish=True)
        async with aclosing(streams[0]) as stream:
            assert [delta.token_ids async for delta in stream] == [(2,)]
        remote.check_health()
