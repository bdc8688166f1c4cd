"""What the decision about a launch has to know of the running cluster."""

import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.core.placement import NodeResources, PlacementError, PlacementPlan, check_feasible
from serve.workers.engine_env import EngineEnv
from serve.workers.mpi_probe import mpi_spawns
from serve.workers.nodes import living_nodes

logger = logging.getLogger(__name__)

_PROBE_LIMIT_S = 120.0


def cluster_grows() -> bool:
    """Return whether an autoscaler may still bring nodes, so that what is missing now is no mistake."""
    # Ray tells it nowhere else. Without an autoscaler there is no such configuration.
    return ray._private.state.state.get_cluster_config() is not None


def has_room(plan: PlacementPlan) -> bool:
    """Return whether another replica would find what it takes now, beside all that runs; or a node would come for it.

    Without a cluster: False.
    """
    if not ray.is_initialized():
        return False
    if cluster_grows():
        return True
    # Ray's public function adds all nodes up, and a replica does not fit into what two nodes have left together.
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    try:
        check_feasible(plan, tuple(NodeResources(node, resources) for node, resources in free.items()))
    except PlacementError:
        return False
    return True


def mpi_works_in_cluster(env: EngineEnv | None) -> bool | None:
    """Return whether MPI can start processes on a node with GPUs, in the engine's environment.

    None, not known: there is no cluster, no such node yet, or none that answered.
    """
    if not ray.is_initialized():
        return None
    node = next((node for node in living_nodes().values() if node.total.get("GPU", 0) > 0), None)
    if node is None:
        return None
    options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}
    if env is not None:
        options["runtime_env"] = env.to_runtime_env({})
    try:
        works = bool(ray.get(_probe.options(**options).remote(), timeout=_PROBE_LIMIT_S))
    except Exception as exc:  # an environment that cannot be made, a node that dies: the replica will say it better
        logger.warning("It could not be found out whether MPI can start processes: %s", exc)
        return None
    logger.info("MPI can%s start processes on node %s.", "" if works else "not", node.node_id[:8])
    return works


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _probe() -> bool:
    return mpi_spawns()
