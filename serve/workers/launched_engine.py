"""LaunchedEngine: a launcher as an engine that is not started yet, so that an engine host can serve it."""

import asyncio
from collections.abc import AsyncGenerator

from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.protocol import Engine, EngineInfo, EngineStats
from serve.errors import EngineDead
from serve.workers.launchers.port import Launcher, RankObserver, RankProcess


class LaunchedEngine:
    """Engine port: `start` launches, `stop` ends what was launched.

    Args:
        launcher: Starts engine and ranks in or below this process.
        observer: Hears of the ranks.
        end_grace_s: How long ranks may take to end by themselves.
    """

    def __init__(self, launcher: Launcher, observer: RankObserver, end_grace_s: float) -> None:
        self._launcher = launcher
        self._observer = observer
        self._end_grace_s = end_grace_s
        self._launching: asyncio.Task[Engine] | None = None
        self._engine: Engine | None = None

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started."""
        return self._started.info

    async def start(self) -> None:
        """Launch."""
        self._launching = asyncio.ensure_future(self._launcher.launch(self._observer))
        try:
            self._engine = await self._launching
        except asyncio.CancelledError:
            self._launching.cancel()
            raise

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens."""
        return self._started.generate(request)

    def stats(self) -> EngineStats:
        """Return the present load."""
        return self._engine.stats() if self._engine is not None else EngineStats()

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache."""
        return self._started.kv_events()

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine is dead, or not launched."""
        self._started.check_health()

    async def stop(self) -> None:
        """Stop the engine, or its start, and end the ranks."""
        if self._launching is not None and not self._launching.done():
            self._launching.cancel()
            await asyncio.wait([self._launching])
        if self._engine is not None:
            await self._engine.stop()
        await self._launcher.end(self._end_grace_s)

    @property
    def _started(self) -> Engine:
        if self._engine is None:
            raise EngineDead("the engine has not been started")
        return self._engine


RankEvent = RankProcess | tuple[int, str | None]  # it was started; it died, of what; or None: it is alive


class RankNews:
    """RankObserver that keeps what it hears until somebody asks."""

    def __init__(self) -> None:
        self._events: list[RankEvent] = []
        self._beats: set[int] = set()
        self._is_new = asyncio.Event()

    def rank_started(self, process: RankProcess) -> None:
        """A rank has a process."""
        self._add(process)

    def rank_beat(self, rank: int) -> None:
        """A rank is alive."""
        if rank not in self._beats:
            self._beats.add(rank)
            self._add((rank, None))

    def rank_died(self, rank: int, reason: str) -> None:
        """A rank is gone."""
        self._add((rank, reason))

    def close(self) -> None:
        """Let whoever waits have an empty answer: there will be no more news."""
        self._is_new.set()

    async def wait(self) -> list[RankEvent]:
        """Wait for news; returns all there are, in order, or nothing at the end. Several beats of a rank are one."""
        await self._is_new.wait()
        self._is_new.clear()
        events, self._events = self._events, []
        self._beats.clear()
        return events

    def _add(self, event: RankEvent) -> None:
        self._events.append(event)
        self._is_new.set()


def tell(observer: RankObserver, events: list[RankEvent]) -> None:
    """Tell an observer what `RankNews` has kept."""
    for event in events:
        match event:
            case RankProcess():
                observer.rank_started(event)
            case rank, None:
                observer.rank_beat(rank)
            case rank, reason:
                observer.rank_died(rank, reason)
