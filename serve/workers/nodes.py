"""Nodes: the machines on which a group has processes. What is left there is killed, and GPU memory waited for."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.core.placement import NodeResources
from serve.workers.gpu_memory import GpuMemory, wait_for_gpu_memory
from serve.workers.processes import kill_group

logger = logging.getLogger(__name__)

_TASK_START_S = 10.0  # a node that cannot start a task in that time is as good as gone


class Nodes(Protocol):
    """Access to the nodes of a group, by id."""

    @property
    def here(self) -> str:
        """Id of the node of this process."""

    async def kill_group(self, node_id: str, group: str, limit_s: float) -> tuple[str, ...]:
        """Kill every process of a group on a node; returns those that will not die. A dead node has none."""

    async def wait_for_memory(
        self, node_id: str, before: GpuMemory, tolerance_bytes: int, limit_s: float
    ) -> tuple[str, ...]:
        """Wait until no more GPU memory is in use on a node than before; returns the GPUs that hold more."""


class LocalNode:
    """This machine only.

    Args:
        node_id: Its id.
    """

    def __init__(self, node_id: str = "") -> None:
        self._node_id = node_id

    @property
    def here(self) -> str:
        """Id of the node of this process."""
        return self._node_id

    async def kill_group(self, node_id: str, group: str, limit_s: float) -> tuple[str, ...]:
        """Kill every process of a group."""
        return await asyncio.to_thread(_kill_group, group, limit_s)

    async def wait_for_memory(
        self, node_id: str, before: GpuMemory, tolerance_bytes: int, limit_s: float
    ) -> tuple[str, ...]:
        """Wait for GPU memory."""
        return await asyncio.to_thread(_wait_for_memory, before, tolerance_bytes, limit_s)


class RayNodes:
    """Every node of the Ray cluster: this one directly, others by a task that is pinned there and takes no CPU."""

    def __init__(self) -> None:
        self._local = LocalNode(ray.get_runtime_context().get_node_id())

    @property
    def here(self) -> str:
        """Id of the node of this process."""
        return self._local.here

    async def kill_group(self, node_id: str, group: str, limit_s: float) -> tuple[str, ...]:
        """Kill every process of a group on a node."""
        if node_id == self.here:
            return await self._local.kill_group(node_id, group, limit_s)
        return await self._run(node_id, partial(_kill_group, group, limit_s), limit_s)

    async def wait_for_memory(
        self, node_id: str, before: GpuMemory, tolerance_bytes: int, limit_s: float
    ) -> tuple[str, ...]:
        """Wait for the GPU memory of a node."""
        if node_id == self.here:
            return await self._local.wait_for_memory(node_id, before, tolerance_bytes, limit_s)
        return await self._run(node_id, partial(_wait_for_memory, dict(before), tolerance_bytes, limit_s), limit_s)

    async def _run(self, node_id: str, work: Callable[[], tuple[str, ...]], limit_s: float) -> tuple[str, ...]:
        if node_id not in await asyncio.to_thread(living_nodes):
            return ()
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = _run_there.options(scheduling_strategy=pinned).remote(work)
        try:
            async with asyncio.timeout(limit_s + _TASK_START_S):
                answer: tuple[str, ...] = await task
                return answer
        except Exception as exc:  # the node died meanwhile, or is cut off: its ranks end by their lease
            ray.cancel(task, force=True)
            logger.warning("Node %s was not cleaned up: %s: %s", node_id[:8], type(exc).__name__, exc)
            return (f"node {node_id[:8]} does not answer",) if node_id in living_nodes() else ()


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _run_there(work: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    return work()


def living_nodes() -> Mapping[str, NodeResources]:
    """Return the nodes that Ray counts as alive, with all their resources. Blocks for milliseconds."""
    nodes: Sequence[dict[str, Any]] = ray.nodes()
    return {node["NodeID"]: NodeResources(node["NodeID"], dict(node["Resources"])) for node in nodes if node["Alive"]}


def _kill_group(group: str, limit_s: float) -> tuple[str, ...]:
    return tuple(f"process {pid} of rank {mark.rank}" for pid, mark in kill_group(group, limit_s).items())


def _wait_for_memory(before: GpuMemory, tolerance_bytes: int, limit_s: float) -> tuple[str, ...]:
    return wait_for_gpu_memory(before, tuple(before), tolerance_bytes=tolerance_bytes, limit_s=limit_s)
