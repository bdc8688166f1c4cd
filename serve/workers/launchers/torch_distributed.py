"""TorchDistributedLauncher: one Ray actor a rank, in the bundles of the replica's placement group; rank 0 leads.

Which bundle each rank gets is decided by `serve.core.placement` from where Ray really put them. The engine is reached
through a local socket (`serve.engines.remote`); what the ranks say to each other is the program's own matter.
"""

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.placement import PlacementError, PlacementPlan, actor_options, order_ranks
from serve.engines.protocol import Engine
from serve.engines.remote.client import RemoteEngine
from serve.errors import ConfigError, EngineDead, RayTRTError
from serve.workers.engine_env import EngineEnv, check_engine_env
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.port import RankObserver, RankProcess
from serve.workers.nodes import Nodes, RayNodes
from serve.workers.processes import GROUP_VARIABLE, GroupMark
from serve.workers.rank import Rank, RankOrder
from serve.workers.rank_program import RankProgram

logger = logging.getLogger(__name__)

_VERDICT_S = 2.0  # how much later than a follower's end the engine may say why


class TorchDistributedLauncher:
    """Launcher port over rank actors.

    Args:
        plan: What the replica has reserved.
        program: What the ranks run.
        settings: How they are watched.
        env: Their Python environment; None: the replica's.
        nodes: Says where the replica is; None: Ray does.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        program: RankProgram,
        settings: GroupSettings,
        *,
        env: EngineEnv | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self._plan = plan
        self._program = program
        self._settings = settings
        self._env = env
        self._nodes = nodes or RayNodes()
        self._actors: list[Any] = []
        self._processes: list[RankProcess] = []
        self._programs: list[asyncio.Task[None]] = []  # of each rank, in rank order
        self._beats: list[asyncio.Task[None]] = []
        self._ending = False

    async def launch(self, observer: RankObserver) -> Engine:
        """Start an actor for each rank, then the engine; see the port."""
        mark = GroupMark.from_text(os.environ[GROUP_VARIABLE])
        if self._env is not None:
            logger.info("The ranks get an environment of their own: %s.", await check_engine_env(self._env))
        await self._start_actors(mark)
        for process in await self._ask_all("describe"):
            self._processes.append(process)
            observer.rank_started(process)
        self._beats = [_task(self._ask_for_beats(rank, observer)) for rank in range(len(self._actors))]
        directory = Path(tempfile.mkdtemp(prefix="raytrt-", dir=self._socket_root()))
        try:
            engine = await self._start_engine(observer, directory / "engine")
        finally:
            shutil.rmtree(directory, ignore_errors=True)  # who is connected needs it no more
        for rank, program in enumerate(self._programs):
            program.add_done_callback(partial(self._program_ended, observer, rank))
        return engine

    def ranks(self) -> Sequence[RankProcess]:
        """Return the ranks' processes, as far as they are known."""
        return tuple(self._processes)

    async def end(self, grace_s: float) -> None:
        """End every rank; see the port."""
        self._ending = True
        for beat in self._beats:
            beat.cancel()
        if grace_s > 0 and self._programs:
            for actor in self._actors:
                actor.leave.remote()
            await asyncio.wait(self._programs, timeout=grace_s)
        for actor in self._actors:
            ray.kill(actor)  # says nothing to a process that is stopped; the group kills that by its mark
        for program in self._programs:
            program.cancel()
        await asyncio.gather(*self._programs, return_exceptions=True)

    # Start

    async def _start_actors(self, mark: GroupMark) -> None:
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ConfigError(
                f"{self._plan.layout.world_size} ranks need a placement group, and this replica has none: deploy it "
                "with the options of PlacementPlan.serve_options"
            )
        table = await asyncio.to_thread(ray.util.placement_group_table, group)
        try:
            order = order_ranks(self._plan, table["bundles_to_node_id"], self._nodes.here)
        except PlacementError as exc:
            raise ConfigError(str(exc)) from exc
        actor_class = ray.remote(Rank)
        for rank, bundle in enumerate(order.bundles):
            strategy = PlacementGroupSchedulingStrategy(group, bundle)
            options = {
                **actor_options(self._plan.rank),
                "scheduling_strategy": strategy,
                "runtime_env": self._runtime_env(mark.for_rank(rank)),
                "max_restarts": 0,
            }
            rank_order = RankOrder(rank, len(order.bundles), self._program, self._settings.lease_s)
            self._actors.append(actor_class.options(**options).remote(rank_order))

    def _runtime_env(self, mark: GroupMark) -> dict[str, Any]:
        environ = {
            GROUP_VARIABLE: mark.to_text(),
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # see `rank_program.device_index`
        }
        return self._env.to_runtime_env(environ) if self._env is not None else {"env_vars": environ}

    def _socket_root(self) -> str | None:
        if self._env is None or self._env.image_uri is None:
            return None
        # Of the host's directories Ray mounts its own only into a container, and tells where it is nowhere else.
        root: str = ray._private.worker._global_node.get_session_dir_path()
        return root

    async def _start_engine(self, observer: RankObserver, path: Path) -> Engine:
        secret = secrets.token_hex(16)
        first, *others = self._actors
        meeting = await self._ask(0, first.open_meeting.remote())
        await self._ask(0, first.listen.remote(meeting, path, secret))
        calls = [first.serve.remote(), *(actor.follow.remote(meeting) for actor in others)]
        self._programs = [_task(self._ask(rank, call)) for rank, call in enumerate(calls)]
        engine = RemoteEngine(path, secret, on_death=lambda reason: observer.rank_died(0, reason))
        starting = _task(engine.start())
        await asyncio.wait([starting, *self._programs], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # a rank has ended; the engine may know better why
            await asyncio.wait([starting], timeout=_VERDICT_S)
        try:
            if not starting.done():
                ended = next(program for program in self._programs if program.done())
                await ended
                raise EngineDead(f"rank {self._programs.index(ended)} ended while the engine started")
            await starting
        except Exception:
            starting.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_VERDICT_S):
                    await engine.stop()
            raise
        return engine

    # While it runs

    async def _ask_all(self, method: str) -> list[Any]:
        calls = [getattr(actor, method).remote() for actor in self._actors]
        return await asyncio.gather(*(self._ask(rank, call) for rank, call in enumerate(calls)))

    async def _ask(self, rank: int, call: Any) -> Any:
        """Wait for a rank's answer; its errors become ours."""
        try:
            return await call
        except RayTaskError as exc:
            if isinstance(exc.cause, RayTRTError):
                raise exc.cause from exc
            raise EngineDead(f"rank {rank} failed: {type(exc.cause).__name__}: {exc.cause}") from exc
        except ActorUnavailableError as exc:
            raise EngineDead(f"rank {rank} cannot be reached any more") from exc
        except RayActorError as exc:
            raise EngineDead(f"rank {rank} died: {str(exc).splitlines()[0]}") from exc
        except RayError as exc:
            raise EngineDead(f"rank {rank} did not come up: {exc}") from exc

    async def _ask_for_beats(self, rank: int, observer: RankObserver) -> None:
        actor = self._actors[rank]
        while True:
            try:
                still_s: float | None = await actor.beat.remote()
            except RayError as exc:
                logger.debug("Rank %d gives no beat: %s", rank, exc)  # its program tells of its death
                return
            observer.rank_beat(rank)
            if still_s is not None and still_s > self._settings.token_limit_s:
                observer.rank_died(rank, f"its process lives, but its program has not advanced for {still_s:.1f} s")
            await asyncio.sleep(self._settings.heartbeat_s)

    def _program_ended(self, observer: RankObserver, rank: int, program: asyncio.Task[None]) -> None:
        error = None if program.cancelled() else program.exception()
        if self._ending:
            return
        reason = str(error) if error is not None else "its program ended"
        observer.rank_died(rank, reason.removeprefix(f"rank {rank} "))


def _task(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)
