"""RayOrchestratorLauncher: TensorRT-LLM starts one Ray actor a rank, in the bundles of the replica's placement group.

The bundles are named explicitly, node by node, the replica's first: rank 0 opens a local socket and a store there. The
engine is constructed in a thread without an event loop (the adapter's `construct` sees to it), not by `AsyncLLM`, which
would force NCCL for every all-reduce.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from serve.core.placement import PlacementError, PlacementPlan, RankOrder, order_ranks
from serve.engines.protocol import Engine
from serve.engines.trtllm.orchestration import Orchestration, engine_environ
from serve.errors import ConfigError
from serve.workers.launchers.local_models import localize_models
from serve.workers.launchers.port import RankObserver, RankProcess
from serve.workers.launchers.ray_ranks import RayRanks
from serve.workers.nodes import living_nodes

logger = logging.getLogger(__name__)


class RayOrchestratorLauncher:
    """Launcher port.

    Args:
        make_engine: Makes the engine, which loads nothing yet.
        plan: What was reserved; its layout is the engine's.
        models: Directories (or ids of a hub, which are downloaded) that every rank needs.
    """

    def __init__(
        self, make_engine: Callable[[Orchestration], Engine], plan: PlacementPlan, models: Sequence[str] = ()
    ) -> None:
        self._make_engine = make_engine
        self._plan = plan
        self._models = tuple(models)
        self._ranks: RayRanks | None = None

    async def launch(self, observer: RankObserver) -> Engine:
        """Check placement and files on every node, start the engine, and find its ranks; see the port."""
        placement_group = ray.util.get_current_placement_group()
        if placement_group is None:
            raise ConfigError(
                "orchestrator: ray needs a placement group for the replica; deploy it with the bundles of its plan "
                "(`serve_options`)"
            )
        check_workers(self._plan, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        here = ray.get_runtime_context().get_node_id()
        order = await asyncio.to_thread(self._order, placement_group, here)
        await localize_models(self._models, order.nodes)
        environ = engine_environ("ray", self._plan.layout, os.environ, await asyncio.to_thread(_visible_gpus, here))
        engine = self._make_engine(Orchestration("ray", (placement_group,), (order.bundles,), environ))
        self._ranks = RayRanks(order.nodes, here, observer)
        starting: asyncio.Future[None] = asyncio.ensure_future(engine.start())
        try:
            await self._ranks.find_while(starting)
            await starting
            await self._ranks.watch()
        except BaseException:
            starting.cancel()
            await engine.stop()
            raise
        return engine

    def ranks(self) -> Sequence[RankProcess]:
        """Return the ranks found so far, on all nodes."""
        return self._ranks.processes() if self._ranks is not None else ()

    async def end(self, grace_s: float) -> None:
        """Wait for the ranks to end, as the engine was stopped; then kill them. See the port."""
        if self._ranks is not None:
            await self._ranks.end(grace_s)

    def _order(self, placement_group: Any, here: str) -> RankOrder:
        table: Mapping[str, Any] = ray.util.placement_group_table(placement_group)
        try:
            return order_ranks(self._plan, table["bundles_to_node_id"], here)
        except PlacementError as exc:
            raise ConfigError(f"parallel: {exc}") from exc


def check_workers(plan: PlacementPlan, visible: str) -> None:
    """Check what TensorRT-LLM's Ray workers take for granted.

    Args:
        plan: What was reserved.
        visible: CUDA_VISIBLE_DEVICES of the replica, which is copied to them; empty: no mask.

    Raises:
        ConfigError: They could not be placed, or not find their GPU.
    """
    cpus = plan.rank.get("CPU", 0)
    if cpus < 1:
        raise ConfigError(
            f"resources.num_cpus={cpus:g}: each rank that TensorRT-LLM starts with Ray takes one CPU for its whole "
            "life, and would never be placed; use 1 or more"
        )
    if not all(part.strip().isdigit() for part in visible.split(",") if visible):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible!r} names GPUs by UUID or MIG id, and TensorRT-LLM's Ray workers know "
            "numbers only; start Ray on this node with numbers, or use orchestrator: mpi"
        )


def _visible_gpus(here: str) -> int | None:
    """Return how many GPUs this process will see; None if that is not known."""
    masked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if masked:
        return len(masked.split(","))
    node = living_nodes().get(here)
    return None if node is None else int(node.total.get("GPU", 0))
