"""GroupWatch: looks after a group's ranks and tokens four times a second, and tells the group what it sees."""

import asyncio
import logging
import time
from collections.abc import Callable

from serve.core.group_state import Cleared, EngineLost, Event, Group, GroupState, RankLost, Stalled, Suspected
from serve.core.heartbeat import Lateness
from serve.core.watchdog import Progress, TokenWatch
from serve.engines.protocol import Engine
from serve.errors import EngineDead
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.port import RankProcess
from serve.workers.rank_watch import RankWatch
from serve.workers.streams import StreamGuard

logger = logging.getLogger(__name__)


class GroupWatch:
    """Feeds beats, deaths and tokens to the pure watchdogs, and their verdicts to the group.

    Args:
        settings: Limits.
        streams: The engine's streams.
        apply: Takes the events.
        group: Returns the group's present state.
    """

    def __init__(
        self,
        settings: GroupSettings,
        streams: StreamGuard,
        apply: Callable[[Event], None],
        group: Callable[[], Group],
    ) -> None:
        self._settings = settings
        self._streams = streams
        self._apply = apply
        self._group = group
        self._beats = settings.heartbeats()
        self._tokens = TokenWatch(settings.token_limits())
        self._processes = RankWatch(lambda rank, reason: apply(RankLost(rank, reason)))
        self._beating: set[int] = set()  # ranks that beat by themselves
        self._task: asyncio.Task[None] | None = None

    def add(self, process: RankProcess) -> None:
        """Watch a process of this node from outside."""
        self._processes.add(process)

    def beat(self, rank: int) -> None:
        """A rank showed itself that it is alive."""
        self._beating.add(rank)
        self._beats = self._beats.beat(rank, time.monotonic())

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prompt was computed."""
        self._tokens = self._tokens.prefilled(tokens, seconds)

    def start(self, engine: Engine) -> None:
        """Begin to look: the engine is ready, and its ranks have no model to load any more."""
        now_s = time.monotonic()
        self._beats = self._settings.heartbeats()
        for rank in self._beating | self._processes.ranks():
            self._beats = self._beats.beat(rank, now_s)
        self._task = asyncio.get_running_loop().create_task(self._run_guarded(engine))

    def close(self) -> None:
        """Look no more. Safe to call twice."""
        self._processes.close()
        if self._task is not None:
            self._task.cancel()

    async def _run_guarded(self, engine: Engine) -> None:
        """A group that nobody looks after any more must not go on as if all were well."""
        try:
            await self._run(engine)
        except Exception as exc:
            logger.exception("The watch over the group failed.")
            self._apply(EngineLost(f"the watch over the group failed: {type(exc).__name__}: {exc}"))

    async def _run(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._settings.look_s)
            lateness, progress = self._look(engine)
            for rank, silent_s in lateness.lost.items():
                self._apply(RankLost(rank, f"no sign of life for {silent_s:.1f} s"))
            if progress is Progress.STALLED:
                self._apply(Stalled(f"no token for {self._deadline_s(engine):.1f} s while requests are running"))
            try:
                engine.check_health()
            except EngineDead as exc:
                self._apply(EngineLost(str(exc)))
            self._suspect(lateness, progress)

    def _look(self, engine: Engine) -> tuple[Lateness, Progress]:
        now_s = time.monotonic()
        for rank in self._processes.running():
            if rank not in self._beating:  # alive and not stopped: as much as can be seen from outside
                self._beats = self._beats.beat(rank, now_s)
        self._beats, lateness = self._beats.look(now_s)
        streams = self._streams
        self._tokens, progress = self._tokens.look(
            now_s,
            deltas=streams.deltas,
            waiting=streams.waiting,
            pending_tokens=streams.pending_tokens,
            longest_tokens=streams.longest_tokens,
            step_s=engine.stats().step_s,
        )
        return lateness, progress

    def _deadline_s(self, engine: Engine) -> float:
        streams = self._streams
        return self._tokens.deadline_s(streams.pending_tokens, streams.longest_tokens, engine.stats().step_s)

    def _suspect(self, lateness: Lateness, progress: Progress) -> None:
        reasons = [f"rank {rank} is silent for {silent_s:.1f} s" for rank, silent_s in lateness.late.items()]
        if progress is Progress.SLOW:
            reasons.append("no token for half of the time allowed")
        if reasons and self._group().state is GroupState.READY:
            self._apply(Suspected(", ".join(reasons)))
        elif not reasons and self._group().state is GroupState.DEGRADED:
            self._apply(Cleared())
