"""EngineHostLauncher: an engine in a Python environment of its own, on the replica's node."""

import asyncio
import logging
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from serve.core.parallel import ParallelLayout
from serve.core.placement import Resources, actor_options
from serve.engines.factory import AnyEngineSettings
from serve.engines.protocol import Engine
from serve.engines.remote.client import RemoteEngine
from serve.engines.trtllm.orchestration import OrchestratorKind
from serve.errors import ConfigError, EngineDead, RayTRTError
from serve.workers.engine_env import EngineEnv, check_engine_env
from serve.workers.engine_host import EngineHost, HostOrder, HostReport
from serve.workers.launchers.port import RankObserver, RankProcess

logger = logging.getLogger(__name__)

HOST_RANK = 0
KILL_LIMIT_S = 5.0


class EngineHostLauncher:
    """Launcher port: one host actor, which is rank 0 to its group; ranks below it are the engine's own matter.

    Args:
        env: The engine's environment.
        engine: Which engine, and its settings.
        model_dir: Its checkpoint on this node.
        layout: How it is cut.
        resources: What the host takes of its bundle.
        bundle_index: Its bundle in the replica's placement group; without a group it is placed on the replica's node.
        orchestrator: Who starts the ranks of a `trtllm` engine.
        rank_bundles: With orchestrator ray: the bundle of each rank.
        environ: Variables that the host's process, and all that it starts, has to carry.
    """

    def __init__(
        self,
        env: EngineEnv,
        engine: AnyEngineSettings,
        model_dir: Path,
        layout: ParallelLayout,
        resources: Resources,
        *,
        bundle_index: int = 0,
        orchestrator: OrchestratorKind = "in_process",
        rank_bundles: tuple[int, ...] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._env = env
        self._engine_settings = engine
        self._model_dir = model_dir
        self._layout = layout
        self._resources = resources
        self._bundle_index = bundle_index
        self._orchestrator = orchestrator
        self._rank_bundles = rank_bundles
        self._environ = dict(environ or {})
        self._actor: Any = None
        self._serving: Any = None
        self._engine: RemoteEngine | None = None
        self._process: RankProcess | None = None
        self._is_ending = False

    @property
    def report(self) -> HostReport:
        """What the host said of itself. Only valid after `launch`."""
        return self._report

    async def launch(self, observer: RankObserver) -> Engine:
        """Check the environment, start the host in it and the engine there; see the port."""
        theirs = await check_engine_env(self._env)
        logger.info("The engine gets an environment of its own: %s.", theirs)
        directory = Path(tempfile.mkdtemp(prefix="raytrt-", dir=self._socket_root()))
        try:
            return await self._launch(observer, directory)
        except Exception:
            await self.end(0.0)
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)  # who is connected needs it no more

    async def _launch(self, observer: RankObserver, directory: Path) -> Engine:
        secret = secrets.token_hex(16)
        order = HostOrder(
            self._engine_settings,
            self._model_dir,
            self._layout,
            directory / "engine",
            secret,
            self._orchestrator,
            self._rank_bundles,
        )
        self._report = report = await self._start_host(order)
        self._process = RankProcess(HOST_RANK, report.node_id, report.pid, report.created_s)
        observer.rank_started(self._process)
        self._engine = engine = RemoteEngine(
            directory / "engine",
            secret,
            on_beat=lambda: observer.rank_beat(HOST_RANK),
            on_death=lambda reason: None if self._is_ending else observer.rank_died(HOST_RANK, reason),
        )
        self._serving = self._actor.serve.remote()
        await engine.start()
        return engine

    async def _start_host(self, order: HostOrder) -> HostReport:
        try:
            self._actor = ray.remote(EngineHost).options(**self._options()).remote(order)
            report: HostReport = await self._actor.listen.remote()
        except ray.exceptions.RuntimeEnvSetupError as exc:
            raise ConfigError(f"engine_env.{self._env.place}: Ray cannot set it up: {exc}") from exc
        except ray.exceptions.RayTaskError as exc:
            cause = exc.cause
            if isinstance(cause, RayTRTError):
                raise cause from exc
            raise EngineDead(f"the engine's host failed: {type(cause).__name__}: {cause}") from exc
        except ray.exceptions.RayError as exc:
            raise EngineDead(f"the engine's host did not come up in engine_env.{self._env.place}: {exc}") from exc
        here = ray.get_runtime_context().get_node_id()
        if report.node_id != here:
            raise ConfigError(
                f"the engine's host is on node {report.node_id[:8]}, its replica on {here[:8]}: bundle "
                f"{self._bundle_index} has to be on the replica's node; use placement strategy STRICT_PACK"
            )
        return report

    def _options(self) -> dict[str, Any]:
        group = ray.util.get_current_placement_group()
        strategy: Any
        if group is None:
            strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        else:
            # Ray workers of TensorRT-LLM name their bundles themselves.
            strategy = PlacementGroupSchedulingStrategy(group, self._bundle_index)
        return {
            **actor_options(self._resources),
            "scheduling_strategy": strategy,
            "runtime_env": self._env.to_runtime_env(self._environ),
            "max_restarts": 0,
        }

    def _socket_root(self) -> str | None:
        if self._env.image_uri is None:
            return None
        # Of the host's directories Ray mounts its own only into a container, and tells where it is nowhere else.
        root: str = ray._private.worker._global_node.get_session_dir_path()
        return root

    def ranks(self) -> Sequence[RankProcess]:
        """Return the host's process, once it is known."""
        return [self._process] if self._process is not None else []

    async def end(self, grace_s: float) -> None:
        """End the host, and with it the engine; see the port."""
        self._is_ending = True
        process = self._find_process()
        if self._engine is not None and process is not None and grace_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._engine.stop()
                    await _gone(process)
        if self._actor is not None:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.kill(self._actor)
            self._actor = None
        if process is None:
            return
        with suppress(psutil.NoSuchProcess):
            process.kill()
        try:
            async with asyncio.timeout(KILL_LIMIT_S):
                await _gone(process)
        except TimeoutError:
            raise TimeoutError(f"the engine's host, process {process.pid}, does not end") from None

    def _find_process(self) -> psutil.Process | None:
        if self._process is None:
            return None
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            if abs(process.create_time() - self._process.created_s) < 1.0:
                return process
        return None


async def _gone(process: psutil.Process) -> None:
    """Wait for the end of a process that is no child of this one."""
    with suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110  # nobody signals it
            await asyncio.sleep(0.02)
