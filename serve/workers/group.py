"""WorkerGroup: an engine and all its ranks, which live and die as one. The Engine port around a launcher.

What to do is decided by `serve.core.group_state`; here it is carried out. After a failure every stream raises
`EngineDead` at once, every process of the group is killed, and the GPUs' memory is waited for; then the group has
stopped, and its replica may be replaced.
"""

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

from serve.core.group_state import (
    Action,
    AwaitMemory,
    EndRanks,
    EngineLost,
    Event,
    FailStreams,
    Group,
    GroupState,
    Launched,
    LaunchFailed,
    LogEntry,
    MemoryReleased,
    RankLost,
    RanksEnded,
    RankStarted,
    Release,
    StopRequested,
    decide,
    to_line,
)
from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.protocol import Engine, EngineInfo, EngineStats
from serve.errors import EngineDead
from serve.workers.gpu_memory import GpuMemory, used_gpu_memory, warn_unwatched
from serve.workers.group_settings import DEFAULT_START_LIMIT_S, GroupSettings
from serve.workers.group_watch import GroupWatch
from serve.workers.launchers.port import Launcher, RankProcess
from serve.workers.nodes import LocalNode, Nodes
from serve.workers.processes import GROUP_VARIABLE, GroupMark, Reaper, kill_stale_groups, start_reaper
from serve.workers.streams import StreamGuard

logger = logging.getLogger(__name__)

_MAX_LOG = 1000  # entries kept; a group that comes and goes between `ready` and `degraded` writes two each time
_FAILED_ENGINE_STOP_S = 2.0  # a failed engine may free what is in this process; its ranks are killed meanwhile


class WorkerGroup:
    """One engine, on one rank or many. One a process, and used once.

    Args:
        launcher: Starts the ranks.
        settings: How they are watched, and how they end.
        nodes: Where the ranks are; None: all on this machine.
        gpus: The GPUs of this process, if its ranks use these: index or UUID, as the driver has them.
    """

    def __init__(
        self, launcher: Launcher, settings: GroupSettings, *, nodes: Nodes | None = None, gpus: Sequence[str] = ()
    ) -> None:
        self._launcher = launcher
        self._settings = settings
        self._nodes = nodes or LocalNode()
        self._gpus = tuple(gpus)
        self._mark = GroupMark.of_this_process(f"g{secrets.token_hex(6)}")
        self._group = Group()
        self._log: deque[LogEntry] = deque(maxlen=_MAX_LOG)
        self._engine: Engine | None = None
        self._streams = StreamGuard(self._engine_died, self._prefilled)
        self._watch: GroupWatch | None = None
        self._reaper: Reaper | None = None
        self._launching: asyncio.Task[Engine] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ranks: dict[int, RankProcess] = {}
        self._memory: dict[str, dict[str, int]] = {}  # node -> GPU -> bytes in use before the start
        self._left = asyncio.Event()  # the state is no longer `starting`
        self._stopped = asyncio.Event()

    @property
    def id(self) -> str:
        """The group's id: what its processes carry in `RAYTRT_GROUP`."""
        return self._mark.group

    @property
    def state(self) -> GroupState:
        """Where the group is in its life."""
        return self._group.state

    @property
    def reason(self) -> str:
        """Why it does not serve, or is degraded; empty if all is well."""
        return self._group.reason

    @property
    def log(self) -> Sequence[LogEntry]:
        """The last things that happened; `serve.core.group_state.replay` decides them again."""
        return tuple(self._log)

    # Engine port

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started."""
        return self._started_engine.info

    async def start(self) -> None:
        """Start every rank, after what dead groups left on this machine is gone.

        Raises:
            EngineDead: A rank was lost on the way, or the start took longer than `start_limit_s`; or what the launcher
                raises. Nothing is left of the group then.
        """
        if self._group.state is not GroupState.STARTING:
            raise EngineDead(self._group.reason)
        try:
            await self._guard()
            if self._left.is_set():  # it was stopped meanwhile
                raise EngineDead(self._group.reason)
            self._launching = asyncio.create_task(self._launcher.launch(self))
            await self._until_launched(self._launching)
        except Exception as exc:
            self._apply(LaunchFailed(str(exc) or type(exc).__name__))
            await self._stopped.wait()
            self._release()  # the reaper may be younger than the group's end
            raise
        except asyncio.CancelledError:
            self._apply(StopRequested())
            raise

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens, as the port says."""
        return self._streams.deltas_of(lambda: self._started_engine.generate(request), request.prompt_tokens)

    def stats(self) -> EngineStats:
        """Return the latest load; none after the group's end."""
        if self._engine is None:
            return EngineStats()
        if not self._group.serves:
            return EngineStats(total_blocks=self._engine.info.total_blocks)
        return self._engine.stats()

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache, as the port says; raises `EngineDead` at the group's end."""
        return self._streams.items_of(lambda: self._started_engine.kv_events())

    def check_health(self) -> None:
        """Raise `EngineDead` if the group does not serve, whatever the reason."""
        self._streams.check()
        if self._engine is not None:
            try:
                self._engine.check_health()
            except EngineDead as exc:
                self._engine_died(str(exc))
                raise

    async def stop(self) -> None:
        """End every rank in order; running streams raise `EngineDead`. Returns when nothing is left."""
        self._apply(StopRequested())
        await self._stopped.wait()

    async def wait_until_stopped(self) -> None:
        """Wait until no process of the group is left and its memory is free; bounded once it has failed."""
        await self._stopped.wait()

    @property
    def _started_engine(self) -> Engine:
        assert self._engine is not None, "start() comes first"
        return self._engine

    # RankObserver

    def rank_started(self, process: RankProcess) -> None:
        """A rank has a process."""
        self._ranks[process.rank] = process
        if process.gpu_memory:
            self._memory.setdefault(process.node_id, {}).update(process.gpu_memory)
        if self._watch is not None and process.node_id == self._nodes.here and process.pid != os.getpid():
            self._watch.add(process)
        self._apply(RankStarted(process.rank, process.node_id, process.pid))

    def rank_beat(self, rank: int) -> None:
        """A rank is alive."""
        if self._watch is not None:
            self._watch.beat(rank)

    def rank_died(self, rank: int, reason: str) -> None:
        """A rank is gone, or cannot go on."""
        self._apply(RankLost(rank, reason))

    # Start

    async def _guard(self) -> None:
        """Clear this machine of dead groups, and see to it that this one leaves nothing behind either."""
        os.environ[GROUP_VARIABLE] = self._mark.to_text()
        self._watch = GroupWatch(self._settings, self._streams, self._apply, lambda: self._group)
        stale = await asyncio.to_thread(kill_stale_groups, self._settings.kill_limit_s)
        if stale:
            logger.warning("Killed what dead groups had left on this machine: %s", ", ".join(stale))
        self._reaper = await asyncio.to_thread(start_reaper, self._mark)
        used: GpuMemory = await asyncio.to_thread(used_gpu_memory) if self._gpus else {}
        if self._gpus and not used:
            warn_unwatched()
        before = {gpu: used[gpu] for gpu in self._gpus if gpu in used}
        self._memory.setdefault(self._nodes.here, {}).update(before)

    async def _until_launched(self, launching: asyncio.Task[Engine]) -> None:
        left = asyncio.create_task(self._left.wait())
        try:
            limit_s = self._settings.start_limit_s or DEFAULT_START_LIMIT_S
            await asyncio.wait([launching, left], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            launching.add_done_callback(_look_at_outcome)
        if self._group.state is not GroupState.STARTING:
            raise EngineDead(self._group.reason)
        if not launching.done():
            raise EngineDead(f"the engine did not start within start_limit_s={limit_s:g} s")
        self._engine = launching.result()
        self._streams.open()
        self._apply(Launched())
        assert self._watch is not None
        self._watch.start(self._engine)

    # Decisions and what follows from them

    def _engine_died(self, reason: str) -> None:
        self._apply(EngineLost(reason))

    def _prefilled(self, tokens: int, seconds: float) -> None:
        if self._watch is not None:
            self._watch.prefilled(tokens, seconds)

    def _apply(self, event: Event) -> None:
        before = self._group
        self._group, actions = decide(before, event)
        if self._group == before and not actions and not isinstance(event, RankStarted):
            return
        entry = LogEntry(time.monotonic(), before, event, self._group, actions)
        self._log.append(entry)
        self._tell(entry)
        if self._group.state is not GroupState.STARTING:
            self._left.set()
        for action in actions:
            self._carry_out(action)

    def _tell(self, entry: LogEntry) -> None:
        state, reason = self._group.state, self._group.reason
        if state is not entry.before.state:
            level = logging.WARNING if state in (GroupState.DEGRADED, GroupState.FAILED) else logging.INFO
            logger.log(level, "Group %s is %s%s", self.id, state.value, f": {reason}" if reason else ".")
        logger.debug("Group %s: %s", self.id, to_line(entry))
        if state is GroupState.STOPPED and any(e.after.state is GroupState.FAILED for e in self._log):
            for past in self._log:  # what is needed to decide it all again
                logger.info("Group %s: %s", self.id, to_line(past))

    def _carry_out(self, action: Action) -> None:
        match action:
            case FailStreams(reason):
                self._streams.close(reason)
            case EndRanks(politely):
                self._spawn(self._end_ranks(politely))
            case AwaitMemory():
                self._spawn(self._await_memory())
            case Release():
                self._release()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The end

    async def _end_ranks(self, politely: bool) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._launching is not None and not self._launching.done():
            self._launching.cancel()  # and nothing is started any more once it has come to an end
            await asyncio.wait([self._launching], timeout=self._settings.kill_limit_s)
        grace_s = self._settings.end_grace_s if politely else 0.0
        survivors: list[str] = []
        try:
            if politely:
                await self._stop_engine(grace_s)
                survivors += await self._end_launcher(grace_s)
            else:
                _, failed = await asyncio.gather(self._stop_engine(_FAILED_ENGINE_STOP_S), self._end_launcher(0.0))
                survivors += failed
            where = {self._nodes.here, *(process.node_id for process in self._ranks.values())}
            for left in await asyncio.gather(*(self._kill_on(node) for node in where)):
                survivors += left
        except Exception as exc:
            logger.exception("Ending the ranks of group %s failed.", self.id)
            survivors.append(f"unknown ({type(exc).__name__}: {exc})")
        if survivors:
            logger.error("Group %s: will not die: %s", self.id, ", ".join(survivors))
        self._apply(RanksEnded(tuple(survivors)))

    async def _kill_on(self, node_id: str) -> tuple[str, ...]:
        try:
            return await self._nodes.kill_group(node_id, self.id, self._settings.kill_limit_s)
        except TimeoutError as exc:
            logger.warning("Group %s: %s; its ranks there are left to their lease.", self.id, exc)
            self._memory.pop(node_id, None)  # nobody can look there
            return ()

    async def _stop_engine(self, limit_s: float) -> None:
        if self._engine is None:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._engine.stop()
        except TimeoutError:
            logger.warning("The engine of group %s did not stop within %.1f s.", self.id, limit_s)
        except Exception:
            logger.exception("The engine of group %s did not stop as it should.", self.id)

    async def _end_launcher(self, grace_s: float) -> list[str]:
        try:
            async with asyncio.timeout(grace_s + 2 * self._settings.kill_limit_s):
                await self._launcher.end(grace_s)
        except TimeoutError as exc:
            return [str(exc) or "the launcher does not come to an end"]
        return []

    async def _await_memory(self) -> None:
        settings = self._settings
        # What a rank in this process holds is given back with this process, and not before.
        memory = {node: before for node, before in self._memory.items() if before and self._ranks}
        waits = [
            self._nodes.wait_for_memory(node, before, settings.memory_tolerance_bytes, settings.memory_limit_s)
            for node, before in memory.items()
        ]
        held: list[str] = []
        try:
            for gpus in await asyncio.gather(*waits):
                held += gpus
        except Exception as exc:
            logger.exception("Waiting for the GPU memory of group %s failed.", self.id)
            held.append(f"unknown ({type(exc).__name__}: {exc})")
        if held:
            logger.error("Group %s: memory was not given back: %s", self.id, "; ".join(held))
        self._apply(MemoryReleased(tuple(held)))

    def _release(self) -> None:
        survivors = [entry.event.survivors for entry in self._log if isinstance(entry.event, RanksEnded)]
        if self._reaper is not None and not any(survivors):
            self._reaper.dismiss()  # else it goes on trying when this process has gone
        self._stopped.set()


def _look_at_outcome(launching: asyncio.Task[Engine]) -> None:
    """Keep asyncio from reporting a failure that came after the group had left `starting` for another reason."""
    if not launching.cancelled() and launching.exception() is not None:
        logger.debug("The launch failed: %s", launching.exception())
