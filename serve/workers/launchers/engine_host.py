"""EngineHostLauncher: an engine in a Python environment of its own, on the replica's node."""

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.placement import PlacementPlan, Resources, actor_options
from serve.engines.factory import AnyEngineSettings
from serve.engines.protocol import Engine
from serve.engines.remote.client import RemoteEngine
from serve.errors import ConfigError, EngineDead, RayTRTError
from serve.workers.engine_env import EngineEnv, check_engine_env
from serve.workers.engine_host import EngineHost, HostOrder, HostReport
from serve.workers.group_settings import GroupSettings
from serve.workers.launched_engine import RankEvent, tell
from serve.workers.launchers.port import RankObserver, RankProcess
from serve.workers.nodes import Nodes, RayNodes
from serve.workers.processes import GROUP_VARIABLE, GroupMark

logger = logging.getLogger(__name__)


class EngineHostLauncher:
    """Launcher port: one host actor, in which the launcher runs that would run in a replica of that environment.

    Args:
        plan: What the replica has reserved. The host gets `plan.host_bundle`; with orchestrator ray it takes nothing
            itself, and is in the replica's bundle.
        env: The engine's environment.
        engine: Which engine, and its settings.
        model_dir: Its checkpoint on this node.
        settings: How ranks are watched, and end.
        nodes: Where they are; None: the nodes of the Ray cluster.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        env: EngineEnv,
        engine: AnyEngineSettings,
        model_dir: Path,
        settings: GroupSettings,
        *,
        nodes: Nodes | None = None,
    ) -> None:
        self._plan = plan
        self._env = env
        self._engine_settings = engine
        self._model_dir = model_dir
        self._settings = settings
        self._nodes = nodes or RayNodes()
        self._group = ""
        self._actor: Any = None
        self._report: HostReport | None = None
        self._below: list[RankProcess] = []
        self._serving: asyncio.Future[None] | None = None
        self._relaying: asyncio.Future[None] | None = None
        self._engine: RemoteEngine | None = None
        self._is_ending = False

    @property
    def report(self) -> HostReport:
        """What the host says of itself. Only valid after `launch`."""
        assert self._report is not None, "launch() comes first"
        return self._report

    async def launch(self, observer: RankObserver) -> Engine:
        """Check the environment, start the host in it, and the engine there; see the port."""
        mark = GroupMark.from_text(os.environ[GROUP_VARIABLE])
        self._group = mark.group
        theirs = await check_engine_env(self._env)
        logger.info("The engine gets an environment of its own: %s.", theirs)
        directory = Path(tempfile.mkdtemp(prefix="raytrt-", dir=self._socket_root()))
        try:
            return await self._launch(observer, mark, directory / "engine")
        finally:
            shutil.rmtree(directory, ignore_errors=True)  # who is connected needs it no more

    def ranks(self) -> Sequence[RankProcess]:
        """Return the host's process, and those of the ranks below it, as far as they are known."""
        return (*([self._report.process] if self._report is not None else []), *self._below)

    async def end(self, grace_s: float) -> None:
        """End the host, and all that it started; see the port."""
        self._is_ending = True
        if self._actor is None:
            return
        if grace_s > 0 and self._engine is not None and self._serving is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._engine.stop()
                    await asyncio.wait([self._serving])
        ray.kill(self._actor)
        survivors = await self._nodes.kill_group(self._nodes.here, self._group, self._settings.kill_limit_s)
        tasks = [task for task in (self._serving, self._relaying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if survivors:
            raise TimeoutError(", ".join(survivors))

    # Start

    async def _launch(self, observer: RankObserver, mark: GroupMark, path: Path) -> Engine:
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ConfigError(
                "engine_env needs a placement group, and this replica has none: deploy it with the options of "
                "PlacementPlan.serve_options"
            )
        secret = secrets.token_hex(16)
        order = HostOrder(self._engine_settings, self._model_dir, self._plan, path, secret, self._settings.end_grace_s)
        self._report = report = await self._start_host(group, mark, order)
        observer.rank_started(report.process)
        rank = report.process.rank
        self._engine = RemoteEngine(
            path,
            secret,
            on_beat=lambda: observer.rank_beat(rank),
            on_death=lambda reason: None if self._is_ending else observer.rank_died(rank, reason),
        )
        self._serving = asyncio.ensure_future(self._serve())
        self._relaying = asyncio.ensure_future(self._relay(observer))
        await self._engine.start()
        return self._engine

    async def _start_host(self, group: Any, mark: GroupMark, order: HostOrder) -> HostReport:
        options = {
            **actor_options(self._host_resources),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, self._host_bundle),
            "runtime_env": self._env.to_runtime_env({GROUP_VARIABLE: mark.to_text()}),
            "max_restarts": 0,
        }
        try:
            self._actor = ray.remote(EngineHost).options(**options).remote(order)
            report: HostReport = await self._actor.listen.remote()
        except RuntimeEnvSetupError as exc:
            raise ConfigError(f"engine_env.{self._env.place}: Ray cannot set it up: {exc}") from exc
        except RayTaskError as exc:
            if isinstance(exc.cause, RayTRTError):
                raise exc.cause from exc
            raise EngineDead(f"the engine's host failed: {type(exc.cause).__name__}: {exc.cause}") from exc
        except RayActorError as exc:
            raise EngineDead(f"the engine's host died in engine_env.{self._env.place}: {_first_line(exc)}") from exc
        except RayError as exc:
            raise EngineDead(f"the engine's host did not come up in engine_env.{self._env.place}: {exc}") from exc
        if report.process.node_id != self._nodes.here:
            raise ConfigError(
                f"the engine's host is on node {report.process.node_id[:8]}, its replica on {self._nodes.here[:8]}: "
                f"bundle {self._host_bundle} has to be on the replica's node"
            )
        return report

    @property
    def _host_bundle(self) -> int:
        return self._plan.host_bundle or 0

    @property
    def _host_resources(self) -> Resources:
        return {} if self._plan.host_bundle is None else self._plan.bundles[self._plan.host_bundle]

    async def _serve(self) -> None:
        with suppress(RayError):  # it ends with the actor's process, in whatever way
            await self._actor.serve.remote()

    async def _relay(self, observer: RankObserver) -> None:
        """Hand on what the host hears of the ranks below it; those of this node are watched from here then."""
        rank = self.report.process.rank

        def hand_on(events: list[RankEvent]) -> None:
            self._below += [event for event in events if isinstance(event, RankProcess)]
            tell(observer, events)

        await relay_news(
            self._actor.rank_news.remote,
            hand_on,
            lambda reason: None if self._is_ending else observer.rank_died(rank, reason),
        )

    def _socket_root(self) -> str | None:
        if self._env.image_uri is None:
            return None
        # Of the host's directories Ray mounts its own only into a container, and tells where it is nowhere else.
        root: str = ray._private.worker._global_node.get_session_dir_path()
        return root


async def relay_news(
    next_news: Callable[[], Awaitable[list[RankEvent]]],
    hand_on: Callable[[list[RankEvent]], None],
    on_loss: Callable[[str], None],
) -> None:
    """Hand on news until there is none, or the host is gone; news that cannot be handed on is a loss, not silence."""
    try:
        while events := await next_news():
            hand_on(events)
    except RayError:
        return  # it ends with the actor's process, in whatever way, and that is watched elsewhere
    except Exception as exc:
        logger.exception("The news of the ranks below the engine's host cannot be handed on.")
        on_loss(f"the news of its ranks is lost: {type(exc).__name__}: {exc}")


def _first_line(exc: RayError) -> str:
    return str(exc).splitlines()[0]
