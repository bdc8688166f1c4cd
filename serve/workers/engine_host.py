"""EngineHost: the actor that holds an engine for its replica, in another Python environment.

That environment has Ray's core and what the engine needs, but not Ray Serve: of ours nothing is imported here but
`serve.core`, `serve.engines`, `serve.errors`, `serve.logs` and modules of this package that need nothing else.
"""

import asyncio
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import ray

from serve.core.parallel import ParallelLayout
from serve.engines.factory import AnyEngineSettings, make_engine
from serve.engines.protocol import Engine
from serve.engines.remote.server import EngineServer
from serve.engines.trtllm.orchestration import Orchestration, OrchestratorKind, engine_environ
from serve.logs import configure_logging
from serve.workers.gpu_memory import used_gpu_memory
from serve.workers.launchers.port import RankProcess

_REPORTED = ("fastapi", "numpy", "ray", "raytrt", "tensorrt_llm", "torch", "transformers")


@dataclass(frozen=True)
class HostOrder:
    """What an engine host is to do. It is pickled: both environments have one release of raytrt, and a pydantic 2.

    Attributes:
        engine: Which engine, and its settings.
        model_dir: Its checkpoint on this node.
        layout: How it is cut.
        path: Of the socket to listen on, in a directory of the replica's.
        secret: Which the replica will show.
        orchestrator: Who starts the ranks of a `trtllm` engine.
        bundle_indices: With orchestrator ray: the bundle of each rank, in this actor's own placement group.
    """

    engine: AnyEngineSettings
    model_dir: Path
    layout: ParallelLayout
    path: Path
    secret: str
    orchestrator: OrchestratorKind = "in_process"
    bundle_indices: tuple[int, ...] = ()

    def make_engine(self) -> Engine:
        """Make the engine; what has to be looked up is looked up here, where it will run."""
        return make_engine(self.engine, self.model_dir, self.layout, self._orchestration(self.layout))

    def _orchestration(self, layout: ParallelLayout) -> Orchestration:
        environ = engine_environ(self.orchestrator, layout, os.environ, len(_gpu_ids()))
        if self.orchestrator != "ray":
            return Orchestration(self.orchestrator, environ=environ)
        group = ray.util.get_current_placement_group()
        return Orchestration("ray", (group,), (self.bundle_indices,), environ)


@dataclass(frozen=True)
class HostReport:
    """What an engine host says of itself once it listens.

    Attributes:
        process: Its process, which is rank 0 to the group.
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
        self._server: EngineServer | None = None

    async def listen(self) -> HostReport:
        """Make the engine, which loads nothing yet, and listen for the replica.

        Raises:
            ConfigError: The engine's library is not installed here, or the socket cannot be made.
        """
        order = self._order
        self._server = EngineServer(order.make_engine(), order.path, order.secret)
        await self._server.listen()
        process = psutil.Process()
        gpus = _gpu_ids()
        used = await asyncio.to_thread(used_gpu_memory) if gpus else {}
        memory = {gpu: used[gpu] for gpu in gpus if gpu in used}
        node_id = ray.get_runtime_context().get_node_id()
        return HostReport(
            RankProcess(0, node_id, process.pid, process.create_time(), memory), sys.executable, _libraries()
        )

    async def serve(self) -> None:
        """Serve the replica until it leaves; then this process ends."""
        assert self._server is not None, "listen() comes first"
        await self._server.run()
        ray.actor.exit_actor()


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
