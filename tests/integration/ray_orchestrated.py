"""Replicas whose engine starts its ranks as TensorRT-LLM's Ray executor does: one actor a rank, in named bundles."""

import os
import secrets
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.placement import PlacementPlan
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import make_engine
from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import EngineDead
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.port import RankProcess
from serve.workers.launchers.ray_orchestrator import RayOrchestratorLauncher
from serve.workers.nodes import RayNodes
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


class TrtllmReplica:
    """A group around the trtllm engine, for one stream that loses a rank.

    Args:
        plan: What was reserved.
        model: A checkpoint.
    """

    def __init__(self, plan: PlacementPlan, model: Path) -> None:
        make = partial(make_engine, TrtllmSettings(), model, plan.layout)
        self._launcher = RayOrchestratorLauncher(make, plan, [str(model)])
        self._group = WorkerGroup(self._launcher, GroupSettings(), nodes=RayNodes())

    async def stream_until_a_rank_dies(self) -> tuple[str, list[dict[str, Any]], int, str]:
        """Kill the last rank after five deltas; return engine, ranks, deltas, and what the stream ended with."""
        await self._group.start()
        ranks = self._launcher.ranks()
        request = GenerateRequest("long", "m", pack_tokens(range(40)), SamplingParams(max_tokens=3000, temperature=0.0))
        deltas, reason = 0, ""
        try:
            async for _ in self._group.generate(request):
                deltas += 1
                if deltas == 5:
                    os.kill(ranks[-1].pid, signal.SIGKILL)  # of another node, but of this machine
        except EngineDead as exc:
            reason = str(exc)
        await self._group.wait_until_stopped()
        return self._group.info.engine, [asdict(process) for process in ranks], deltas, reason
