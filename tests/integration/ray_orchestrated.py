"""A replica whose engine starts its ranks as TensorRT-LLM's Ray executor does: one actor a rank, in named bundles."""

import os
import secrets
from dataclasses import asdict
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.placement import PlacementPlan
from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.trtllm.orchestration import Orchestration
from serve.workers.launchers.port import RankProcess
from serve.workers.launchers.ray_orchestrator import RayOrchestratorLauncher
from serve.workers.processes import GROUP_VARIABLE, GroupMark

_OWN_TO_A_PROCESS = ("RAY_RAYLET_PID", "RAY_NODE_IP_ADDRESS")


@ray.remote(num_gpus=1)
class RayWorkerWrapper:
    """A rank."""

    def place(self) -> tuple[str, int]:
        """Return node and process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


class RayEngine(SimulatedEngine):
    """Starts ranks; never ends them, as the executor of 1.2.x leaves that to the collection of garbage."""

    def __init__(self, orchestration: Orchestration) -> None:
        super().__init__(SimulatedSettings.model_validate({"latency": {"kind": "fixed"}}))
        self._orchestration = orchestration

    async def start(self) -> None:
        groups, indices = self._orchestration.placement_groups, self._orchestration.bundle_indices
        environ = {name: value for name, value in os.environ.items() if name not in _OWN_TO_A_PROCESS}
        self.workers: list[Any] = [
            RayWorkerWrapper.options(  # type: ignore[attr-defined]
                num_gpus=1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
                runtime_env={"env_vars": environ},
            ).remote()
            for group, bundles in zip(groups, indices, strict=True)
            for bundle in bundles
        ]
        self.places = [await worker.place.remote() for worker in self.workers]
        await super().start()


class Host:
    """The replica: launches, and tells what it was told.

    Args:
        plan: What was reserved.
        models: Directories that ranks need.
    """

    def __init__(self, plan: PlacementPlan, models: tuple[str, ...]) -> None:
        os.environ[GROUP_VARIABLE] = GroupMark.of_this_process(f"t{secrets.token_hex(4)}").to_text()
        self._launcher = RayOrchestratorLauncher(self._make_engine, plan, models)
        self.died: list[tuple[int, str]] = []
        self.beats: dict[int, int] = {}
        self._engine: RayEngine | None = None

    def _make_engine(self, orchestration: Orchestration) -> Engine:
        self._engine = RayEngine(orchestration)
        return self._engine

    async def launch(self) -> tuple[str, list[dict[str, Any]], list[tuple[str, int]]]:
        """Return the node, the ranks as found, and where they really are."""
        await self._launcher.launch(self)
        assert self._engine is not None
        found = [asdict(process) for process in self._launcher.ranks()]
        return ray.get_runtime_context().get_node_id(), found, self._engine.places

    async def told(self) -> tuple[list[tuple[int, str]], dict[int, int]]:
        """Return deaths, and beats of each rank."""
        return self.died, self.beats

    async def end(self, grace_s: float) -> None:
        """End the launch."""
        await self._launcher.end(grace_s)

    # RankObserver

    def rank_started(self, process: RankProcess) -> None:
        """Known by the launcher."""

    def rank_beat(self, rank: int) -> None:
        """Count."""
        self.beats[rank] = self.beats.get(rank, 0) + 1

    def rank_died(self, rank: int, reason: str) -> None:
        """Remember."""
        self.died.append((rank, reason))
