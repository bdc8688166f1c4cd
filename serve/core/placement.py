"""Placement: a parallel layout -> placement-group bundles, and which bundle each rank gets.

Rank r is tensor shard r % tensor of pipeline stage r // tensor. Ranks of one stage talk in every layer, so they share a
node unless the layout allows otherwise; stages talk once a step, and follow each other from node to node. Rank 0 is on
the replica's node: engines reach it through a local socket. Resources are written as Ray writes them (`CPU`, `GPU`,
`memory`, custom names), but nothing here knows Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.core.parallel import ParallelLayout
from serve.core.resources import ACCELERATOR, add, add_all, describe, times
from serve.core.resources import Resources as Resources

LauncherKind = Literal["in_process", "mpi", "ray", "torch_distributed"]
Strategy = Literal["STRICT_PACK", "STRICT_SPREAD"]

# Launchers whose ranks are processes below the one that holds the engine, so that all its GPUs have to be its own.
_SINGLE_HOST: frozenset[LauncherKind] = frozenset({"in_process", "mpi"})
_EPSILON = 1e-6


class PlacementError(ValueError):
    """The ranks cannot be placed as the layout asks; says what there is, and the remedy. Nothing was taken."""


@dataclass(frozen=True)
class PlacementPlan:
    """What one replica reserves.

    Attributes:
        layout: How the engine is cut.
        launcher: Who starts the ranks.
        bundles: Resources of each placement-group bundle; the replica is in bundle 0.
        strategy: STRICT_PACK: all on one node; STRICT_SPREAD: each on a node of its own.
        bundle_ranks: How many ranks each bundle has room for; they add up to the layout's world size.
        replica: What the replica's own process takes of bundle 0.
        rank: What each rank takes of its bundle; empty if the ranks live below the replica or the engine's host.
        host_bundle: The bundle that holds the whole engine, if that is neither the replica nor one rank a process.
    """

    layout: ParallelLayout
    launcher: LauncherKind
    bundles: tuple[Resources, ...]
    strategy: Strategy
    bundle_ranks: tuple[int, ...]
    replica: Resources
    rank: Resources
    host_bundle: int | None = None

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node but the last, which may have fewer; what TensorRT-LLM calls `gpus_per_node`."""
        return self.layout.world_size if self.strategy == "STRICT_PACK" else self.bundle_ranks[0]

    def serve_options(self) -> dict[str, Any]:
        """Return the options of a Serve deployment that say the same."""
        return {
            "placement_group_bundles": [dict(bundle) for bundle in self.bundles],
            "placement_group_strategy": self.strategy,
            "ray_actor_options": actor_options(self.replica),
        }


@dataclass(frozen=True)
class NodeResources:
    """One node of the cluster: everything that it has, whether free or in use."""

    node_id: str
    total: Resources


@dataclass(frozen=True)
class RankOrder:
    """Where each rank is; both in rank order.

    Attributes:
        bundles: Bundle index of each rank; one bundle may hold several.
        nodes: Node id of each rank.
    """

    bundles: tuple[int, ...]
    nodes: tuple[str, ...]


def plan_placement(
    layout: ParallelLayout,
    launcher: LauncherKind,
    *,
    replica: Resources,
    rank: Resources,
    own_environment: bool = False,
) -> PlacementPlan:
    """Plan the bundles of one replica.

    Args:
        layout: How the engine is cut.
        launcher: Who starts the ranks.
        replica: What the replica's process takes, for instance `{"CPU": 1}`; no GPU.
        rank: What each rank takes, `{"GPU": 1, "CPU": 1}` on a GPU; TensorRT-LLM's Ray workers need the CPU, too.
        own_environment: The engine runs in another Python environment than the replica, thus in a process of its own.

    Raises:
        PlacementError: This launcher cannot start such a layout.
    """
    node_ranks = _ranks_of_nodes(layout)
    _check_launcher(layout, launcher, len(node_ranks))
    if launcher in _SINGLE_HOST:
        engine = times(rank, layout.world_size)
        if own_environment:
            rooms = (0, layout.world_size)
            return PlacementPlan(layout, launcher, (replica, engine), "STRICT_PACK", rooms, replica, {}, host_bundle=1)
        whole = add(replica, engine) if launcher == "mpi" else engine  # one rank is the replica itself
        return PlacementPlan(layout, launcher, (whole,), "STRICT_PACK", (layout.world_size,), whole, {})
    if len(node_ranks) == 1:
        bundles = (replica, *(dict(rank) for _ in range(layout.world_size)))
        return PlacementPlan(layout, launcher, bundles, "STRICT_PACK", (0, *(1,) * layout.world_size), replica, rank)
    # One bundle a node, so that a stage can never be torn apart, and rank 0 is with the replica by construction.
    shares = [times(rank, ranks) for ranks in node_ranks]
    shares[0] = add(replica, shares[0])
    return PlacementPlan(layout, launcher, tuple(shares), "STRICT_SPREAD", node_ranks, replica, rank)


def check_feasible(plan: PlacementPlan, nodes: Sequence[NodeResources]) -> None:
    """Check that the cluster could hold one such replica if nothing else ran on it.

    Raises:
        PlacementError: It never could; lists what the nodes have, and the remedy.
    """
    needs = _needs(plan)
    if _matches(needs, [node.total for node in nodes]):
        return
    raise PlacementError(
        f"no room for tensor={plan.layout.tensor} x pipeline={plan.layout.pipeline}: it takes "
        f"{_describe_needs(needs)}, and the cluster has {_describe_nodes(nodes, needs)}; {_remedy(plan, needs, nodes)}"
    )


def order_ranks(plan: PlacementPlan, bundle_nodes: Mapping[int, str], replica_node: str) -> RankOrder:
    """Give each rank a bundle, from where Ray really put the bundles.

    The replica's node comes first, then node by node in the order of the bundles; a stage stays on one node where it
    can, and the ranks of one node follow each other.

    Args:
        plan: What was reserved.
        bundle_nodes: Node of each bundle, as `placement_group_table` has them.
        replica_node: Where the replica runs.

    Raises:
        PlacementError: Rank 0 would not be on the replica's node, or a stage would be torn apart.
    """
    missing = [index for index in range(len(plan.bundles)) if not bundle_nodes.get(index)]
    if missing:
        raise PlacementError(
            f"bundles {missing} of the placement group have no node: it is not placed yet, or lost one"
        )
    slots: dict[str, list[int]] = {replica_node: []}
    for index, room in enumerate(plan.bundle_ranks):
        slots.setdefault(bundle_nodes[index], []).extend([index] * room)
    if not slots[replica_node]:
        raise PlacementError(
            f"rank 0 has to be on the replica's node {replica_node[:8]}, and no rank's bundle is there, but on "
            f"{', '.join(sorted({node[:8] for node in bundle_nodes.values()}))}; use strategy {plan.strategy}"
        )
    tensor, crossing = plan.layout.tensor, plan.layout.tensor_across_nodes
    torn = [node for node, indices in slots.items() if len(indices) % tensor]
    if torn and not crossing:
        raise PlacementError(
            f"tensor={tensor}: a stage would be spread over nodes, as node {torn[0][:8]} holds {len(slots[torn[0]])} "
            f"ranks; use strategy {plan.strategy}, or set tensor_across_nodes: true"
        )
    placed = [(index, node) for node, indices in slots.items() for index in indices]
    return RankOrder(tuple(index for index, _ in placed), tuple(node for _, node in placed))


def actor_options(resources: Resources) -> dict[str, Any]:
    """Return the options of a Ray actor that takes these resources of a bundle."""
    options: dict[str, Any] = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    if "memory" in resources:
        options["memory"] = resources["memory"]
    # The bundle is on the right kind of node already, and holds that mark once, for all its ranks.
    skip = {"CPU", "GPU", "memory"} | {name for name in resources if name.startswith(ACCELERATOR)}
    custom = {name: amount for name, amount in resources.items() if name not in skip}
    if custom:
        options["resources"] = custom
    return options


def _ranks_of_nodes(layout: ParallelLayout) -> tuple[int, ...]:
    """Return how many ranks each node takes: whole stages, as many as fit, if one fits at all."""
    per_node = layout.gpus_per_node
    if per_node is None or per_node >= layout.world_size:
        return (layout.world_size,)
    if per_node >= layout.tensor:
        per_node -= per_node % layout.tensor
    full, rest = divmod(layout.world_size, per_node)
    return (per_node,) * full + ((rest,) if rest else ())


def _check_launcher(layout: ParallelLayout, launcher: LauncherKind, nodes: int) -> None:
    if launcher == "in_process" and layout.world_size > 1:
        raise PlacementError(
            f"orchestrator in_process runs one rank, and tensor={layout.tensor} x pipeline={layout.pipeline} are "
            f"{layout.world_size}; use mpi or ray"
        )
    if launcher == "mpi" and nodes > 1:
        raise PlacementError(
            f"orchestrator mpi starts ranks on one node, and gpus_per_node={layout.gpus_per_node} spreads "
            f"{layout.world_size} over {nodes}; use ray, or raise gpus_per_node"
        )


def _needs(plan: PlacementPlan) -> list[Resources]:
    """Return what has to be on each node."""
    return [add_all(plan.bundles)] if plan.strategy == "STRICT_PACK" else list(plan.bundles)


def _matches(needs: Sequence[Resources], rooms: Sequence[Resources]) -> bool:
    """Whether each need gets a room of its own that is large enough: a bipartite matching by augmenting paths."""
    taken: dict[int, int] = {}  # room -> need

    def place(need: int, tried: set[int]) -> bool:
        for room, total in enumerate(rooms):
            if room in tried or not _fits(needs[need], total):
                continue
            tried.add(room)
            if room not in taken or place(taken[room], tried):
                taken[room] = need
                return True
        return False

    return all(place(need, set()) for need in range(len(needs)))


def _fits(need: Resources, total: Resources) -> bool:
    return all(total.get(name, 0) >= amount - _EPSILON for name, amount in need.items())


def _remedy(plan: PlacementPlan, needs: Sequence[Resources], nodes: Sequence[NodeResources]) -> str:
    gpus = max((need.get("GPU", 0) for need in needs), default=0)
    most = max((int(node.total.get("GPU", 0)) for node in nodes), default=0)
    if gpus and not most:
        return "start Ray on GPU nodes (ray start --num-gpus), or use an engine that needs none"
    if gpus > most:
        return _fewer_gpus_a_node(plan, nodes)
    if len(needs) > len(nodes):
        return f"add {len(needs) - len(nodes)} node(s), or raise gpus_per_node to use fewer"
    names = sorted({name for need in needs for name in need} - {"GPU"})
    return f"add nodes that have all of it, or ask for less of {', '.join(names) or 'GPU'}"


def _fewer_gpus_a_node(plan: PlacementPlan, nodes: Sequence[NodeResources]) -> str:
    """Say what would fit instead; only what `check_feasible` would accept of these nodes."""
    spread = _spread(plan, nodes, plan.layout.tensor)
    ways = []
    if spread is not None:
        by_ray = "use orchestrator ray with " if plan.launcher == "mpi" else "set "
        ways.append(f"{by_ray}gpus_per_node: {spread} to put stages on several nodes")
    else:
        for tensor in range(plan.layout.tensor - 1, 0, -1):
            spread = None if plan.layout.world_size % tensor else _spread(plan, nodes, tensor)
            if spread is not None:
                pipeline = plan.layout.world_size // tensor
                by_ray = ", with orchestrator ray" if plan.launcher == "mpi" else ""
                ways.append(f"lower tensor to {tensor}: pipeline: {pipeline} and gpus_per_node: {spread}{by_ray}")
                break
    smaller = next(
        (size for size in range(plan.layout.world_size - 1, 0, -1) if _holds(ParallelLayout(tensor=size), plan, nodes)),
        0,
    )
    if smaller:
        ways.append(f"lower tensor x pipeline to {smaller} or less on one node")
    if spread is None:
        ways.append("add nodes that have it")
    return ", or ".join(ways)


def _spread(plan: PlacementPlan, nodes: Sequence[NodeResources], tensor: int) -> int | None:
    """Return the most `gpus_per_node` with which these nodes hold as many ranks, `tensor` of them a stage."""
    world_size = plan.layout.world_size
    for per_node in range(world_size - 1, tensor - 1, -1):
        layout = ParallelLayout(tensor=tensor, pipeline=world_size // tensor, gpus_per_node=per_node)
        if _holds(layout, plan, nodes):
            return layout.tensor * (per_node // layout.tensor)
    return None


def _holds(layout: ParallelLayout, plan: PlacementPlan, nodes: Sequence[NodeResources]) -> bool:
    replica, rank = _replica_and_rank(plan)
    other = plan_placement(layout, "ray", replica=replica, rank=rank)
    return _matches(_needs(other), [node.total for node in nodes])


def _replica_and_rank(plan: PlacementPlan) -> tuple[Resources, Resources]:
    """Return what one process takes; where one bundle has the whole engine, its replica's share is with the ranks."""
    if plan.rank:
        return plan.replica, plan.rank
    whole = plan.bundles[plan.host_bundle or 0]
    rank = {
        name: amount if name.startswith(ACCELERATOR) else amount / plan.layout.world_size
        for name, amount in whole.items()
    }
    return ({} if plan.host_bundle is None else plan.replica), rank


def _describe_needs(needs: Sequence[Resources]) -> str:
    shapes = [describe(need) for need in needs]
    if len(shapes) == 1:
        return f"one node with {shapes[0]}"
    kinds = ", ".join(f"{shapes.count(shape)} with {shape}" for shape in dict.fromkeys(shapes))
    return f"{len(shapes)} nodes: {kinds}"


def _describe_nodes(nodes: Sequence[NodeResources], needs: Sequence[Resources]) -> str:
    if not nodes:
        return "no node"
    names = list(dict.fromkeys(name for need in needs for name in need))
    return "; ".join(
        f"node {node.node_id[:8]}: {describe({name: node.total.get(name, 0) for name in names})}" for node in nodes
    )
