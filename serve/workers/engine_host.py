"""EngineHost: the actor that holds an engine for its replica, in another Python environment.

That environment has Ray's core and what the engine needs, but not Ray Serve: of ours nothing is imported here but
`serve.core`, `serve.engines`, `serve.errors`, `serve.logs` and modules of this package that need nothing else.
"""

import asyncio
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray

from serve.core.placement import PlacementPlan
from serve.engines.factory import AnyEngineSettings
from serve.engines.remote.server import EngineServer
from serve.logs import configure_logging
from serve.workers.gpu_memory import used_gpu_memory
from serve.workers.launched_engine import LaunchedEngine, RankEvent, RankNews
from serve.workers.launchers.hosting import make_hosting_launcher
from serve.workers.launchers.port import Launcher, RankProcess

_REPORTED = ("fastapi", "numpy", "ray", "raytrt", "tensorrt_llm", "torch", "transformers")
_STOP_SLACK_S = 10.0  # for ranks that have to be killed


@dataclass(frozen=True)
class HostOrder:
    """What an engine host is to do. It is pickled: both environments have one release of raytrt, and a pydantic 2.

    Attributes:
        engine: Which engine, and its settings.
        model_dir: Its checkpoint on this node.
        plan: Who starts its ranks, and what was reserved for them.
        path: Of the socket to listen on, in a directory of the replica's.
        secret: Which the replica will show.
        end_grace_s: How long ranks may take to end by themselves.
    """

    engine: AnyEngineSettings
    model_dir: Path
    plan: PlacementPlan
    path: Path
    secret: str
    end_grace_s: float

    @property
    def host_rank(self) -> int:
        """The number under which the group watches the host: the only rank, or one behind the ranks below it."""
        return 0 if self.plan.launcher == "in_process" else self.plan.layout.world_size

    def make_launcher(self) -> Launcher:
        """Make the launcher that would be in the replica if that had this environment."""
        node_id = ray.get_runtime_context().get_node_id()
        return make_hosting_launcher(self.engine, self.model_dir, self.plan, node_id)


@dataclass(frozen=True)
class HostReport:
    """What an engine host says of itself once it listens.

    Attributes:
        process: Its process, as the group watches it.
        python: Its interpreter.
        libraries: Versions of what is installed there.
    """

    process: RankProcess
    python: str
    libraries: dict[str, str]


class EngineHost:
    """One engine, for one replica; lives no longer than that.

    Args:
        order: What to host.
    """

    def __init__(self, order: HostOrder) -> None:
        configure_logging()
        self._order = order
        self._news = RankNews()
        self._server: EngineServer | None = None

    async def listen(self) -> HostReport:
        """Listen for the replica, which starts the engine.

        Raises:
            ConfigError: The socket cannot be made.
        """
        order = self._order
        engine = LaunchedEngine(order.make_launcher(), self._news, order.end_grace_s)
        stop_timeout_s = 2 * order.end_grace_s + _STOP_SLACK_S
        self._server = EngineServer(engine, order.path, order.secret, stop_timeout_s=stop_timeout_s)
        await self._server.listen()
        process = psutil.Process()
        node_id, gpus = ray.get_runtime_context().get_node_id(), _gpu_ids()
        used = await asyncio.to_thread(used_gpu_memory) if gpus else {}
        memory = {gpu: used[gpu] for gpu in gpus if gpu in used}
        rank = RankProcess(order.host_rank, node_id, process.pid, process.create_time(), memory)
        return HostReport(rank, sys.executable, _libraries())

    async def serve(self) -> None:
        """Serve the replica until it leaves; then this process ends."""
        assert self._server is not None, "listen() comes first"
        await self._server.run()
        self._news.close()  # an actor that is asked something takes two seconds longer to exit
        ray.actor.exit_actor()

    async def rank_news(self) -> list[RankEvent]:
        """Wait for news of the ranks below this process; nothing: there will be no more."""
        return await self._news.wait()


def _libraries() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpu_ids() -> list[str]:
    """Return the GPUs that Ray gave to this actor."""
    ids: dict[str, list[Any]] = ray.get_runtime_context().get_accelerator_ids()
    return [str(gpu) for gpu in ids.get("GPU", [])]
