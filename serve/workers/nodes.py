"""Nodes: the machines on which a group has processes. What is left there is killed, and GPU memory waited for."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.core.placement import NodeResources
from serve.workers.gpu_memory import GpuMemory, wait_for_gpu_memory
from serve.workers.processes import kill_group

_POLL_S = 0.25  # between two looks whether a node lives that has not answered yet


class Nodes(Protocol):
    """Access to the nodes of a group, by id."""

    @property
    def here(self) -> str:
        """Id of the node of this process."""

    async def kill_group(self, node_id: str, group: str, limit_s: float) -> tuple[str, ...]:
        """Kill every process of a group on a node; returns those that will not die. A dead node has none.

        Raises:
            TimeoutError: The node does not answer within `limit_s`; its ranks end by their lease, if it lives.
        """

    async def wait_for_memory(
        self, node_id: str, before: GpuMemory, tolerance_bytes: int, limit_s: float
    ) -> tuple[str, ...]:
        """Wait until no more GPU memory is in use on a node than before; returns the GPUs that hold more.

        Raises:
            TimeoutError: The node does not answer.
        """


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
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = _run_there.options(scheduling_strategy=pinned).remote(work)
        answer: asyncio.Future[tuple[str, ...]] = asyncio.ensure_future(_wait_for(task))
        deadline_s = time.monotonic() + limit_s
        while not answer.done():
            if node_id not in await asyncio.to_thread(living_nodes):
                answer.cancel()
                return ()
            if time.monotonic() > deadline_s:
                answer.cancel()
                ray.cancel(task, force=True)
                raise TimeoutError(f"node {node_id[:8]} does not answer within {limit_s:.0f} s")
            await asyncio.wait([answer], timeout=_POLL_S)
        try:
            return answer.result()
        except RayError as exc:  # the node is about to be counted as dead
            raise TimeoutError(f"node {node_id[:8]} does not answer: {str(exc).splitlines()[0]}") from exc


async def _wait_for(task: Any) -> tuple[str, ...]:
    answer: tuple[str, ...] = await task
    return answer


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
