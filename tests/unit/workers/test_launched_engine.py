"""A launcher as an engine: what a host serves, and what it tells of ranks."""

import asyncio
from collections.abc import Sequence

import pytest

from serve.engines.protocol import Engine, EngineStats
from serve.errors import ConfigError, EngineDead
from serve.workers.launched_engine import LaunchedEngine, RankNews, tell
from serve.workers.launchers.port import RankObserver, RankProcess
from tests.unit.engines.remote.scripted_engine import INFO, ScriptedEngine

PROCESSES = [RankProcess(rank, "node", 100 + rank, 0.0) for rank in range(2)]


class ScriptedLauncher:
    """Launches when it may."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_launch = asyncio.Event()
        self.may_launch.set()
        self.error = error
        self.engine = ScriptedEngine()
        self.graces: list[float] = []
        self.cancelled = False

    async def launch(self, observer: RankObserver) -> Engine:
        observer.rank_started(PROCESSES[0])
        try:
            await self.may_launch.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error
        observer.rank_started(PROCESSES[1])
        return self.engine

    def ranks(self) -> Sequence[RankProcess]:
        return PROCESSES

    async def end(self, grace_s: float) -> None:
        self.graces.append(grace_s)


class Record:
    """What an observer is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def rank_started(self, process: RankProcess) -> None:
        self.told.append(process)

    def rank_beat(self, rank: int) -> None:
        self.told.append(rank)

    def rank_died(self, rank: int, reason: str) -> None:
        self.told.append((rank, reason))


async def test_a_start_launches_and_a_stop_ends_what_was_launched() -> None:
    launcher, record = ScriptedLauncher(), Record()
    engine = LaunchedEngine(launcher, record, 3.0)
    assert engine.stats() == EngineStats()
    with pytest.raises(EngineDead, match="not been started"):
        engine.check_health()
    await engine.start()
    assert record.told == PROCESSES
    assert engine.info == INFO
    assert engine.stats() == launcher.engine.stats()
    engine.check_health()
    await engine.stop()
    assert launcher.engine.stopped.is_set()
    assert launcher.graces == [3.0]
    with pytest.raises(EngineDead, match="stopped"):
        engine.check_health()


async def test_a_launch_that_fails_is_the_starts_error_and_is_ended() -> None:
    launcher = ScriptedLauncher(ConfigError("no MPI"))
    engine = LaunchedEngine(launcher, Record(), 3.0)
    with pytest.raises(ConfigError, match="no MPI"):
        await engine.start()
    await engine.stop()
    assert launcher.graces == [3.0]


async def test_a_stop_ends_a_launch() -> None:
    launcher = ScriptedLauncher()
    launcher.may_launch.clear()
    engine = LaunchedEngine(launcher, Record(), 3.0)
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await engine.stop()
    await asyncio.gather(starting, return_exceptions=True)
    assert launcher.cancelled
    assert launcher.graces == [3.0]


async def test_a_stop_before_a_start_ends_nothing_that_is_not_there() -> None:
    launcher = ScriptedLauncher()
    await LaunchedEngine(launcher, Record(), 0.0).stop()
    assert not launcher.engine.stopped.is_set()


async def test_news_arrive_in_order_with_beats_counted_once() -> None:
    news, record = RankNews(), Record()
    news.rank_started(PROCESSES[0])
    for _ in range(100):
        news.rank_beat(0)
    news.rank_died(0, "signal 9")
    tell(record, await news.wait())
    assert record.told == [PROCESSES[0], 0, (0, "signal 9")]
    waiting = asyncio.ensure_future(news.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    news.rank_beat(0)  # it is news again
    tell(record, await waiting)
    assert record.told[3:] == [0]


async def test_who_waits_for_news_that_will_not_come_has_an_empty_answer() -> None:
    news = RankNews()
    waiting = asyncio.ensure_future(news.wait())
    await asyncio.sleep(0)
    news.close()
    assert await waiting == []
