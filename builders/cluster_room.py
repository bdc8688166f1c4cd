"""Whether a cluster could ever run a build's steps, and what it has if it could not. PURE."""

from collections.abc import Sequence

from builders.graph import BuildGraph, StepNode
from builders.resources import StepResources, without_labels
from builders.settings.target import TargetSettings
from serve.core.parallel import ParallelLayout
from serve.core.placement import NodeResources, PlacementError, PlacementPlan, check_feasible
from serve.core.resources import ACCELERATOR, add_all, describe
from serve.errors import ConfigError

_SHOWN = ("GPU", "CPU", "memory")


def check_accelerator(target: TargetSettings, nodes: Sequence[NodeResources]) -> None:
    """Check that there is a node with the GPUs of a target.

    Raises:
        ConfigError: There is none; lists what each node has.
    """
    label = f"{ACCELERATOR}{target.accelerator}"
    if target.accelerator is not None and not any(label in node.total for node in nodes):
        raise ConfigError(
            f"target.accelerator: no node has {target.accelerator!r}. {describe_cluster(nodes)}. Name a type that is "
            "there, start Ray on a node with such GPUs (ray start --address=...), or give --address of another cluster"
        )


def check_room(graph: BuildGraph, nodes: Sequence[NodeResources]) -> None:
    """Check that every step has room, if nothing else ran there.

    Raises:
        ConfigError: One never will; says what it takes, and what each node has.
    """
    for step in graph.steps:
        if not _fits(step.resources, nodes):
            raise ConfigError(
                f"step {step.name.value}: {_needs(step)}, and no node has room for that even when it is idle. "
                f"{describe_cluster(nodes)}. Lower target.num_cpus, target.memory_bytes or parallel, or add nodes"
            )


def describe_cluster(nodes: Sequence[NodeResources]) -> str:
    """Return what each node has, for messages."""
    if not nodes:
        return "The cluster has no node"
    return "The cluster has " + "; ".join(_describe_node(node) for node in nodes)


def _describe_node(node: NodeResources) -> str:
    amounts = describe({name: node.total[name] for name in _SHOWN if node.total.get(name)})
    types = sorted(name.removeprefix(ACCELERATOR) for name in node.total if name.startswith(ACCELERATOR))
    return f"node {node.node_id[:8]}: {amounts}, GPU type {', '.join(types) or 'none'}"


def _needs(step: StepNode) -> str:
    shapes = [describe(without_labels(bundle)) for bundle in step.resources.bundles]
    if step.resources.strategy == "STRICT_PACK":
        return f"it takes {describe(without_labels(add_all(step.resources.bundles)))} of one node"
    return f"it takes {len(shapes)} nodes with {', '.join(dict.fromkeys(shapes))}"


def _fits(resources: StepResources, nodes: Sequence[NodeResources]) -> bool:
    rooms = (1,) * len(resources.bundles)
    plan = PlacementPlan(ParallelLayout(), "in_process", resources.bundles, resources.strategy, rooms, {}, {})
    try:
        check_feasible(plan, nodes)
    except PlacementError:
        return False
    return True
