"""Placement: laws that hold for every layout and every cluster."""

import re
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.core.parallel import ParallelLayout
from serve.core.placement import (
    LauncherKind,
    NodeResources,
    PlacementError,
    PlacementPlan,
    actor_options,
    check_feasible,
    order_ranks,
    plan_placement,
)

REPLICA = {"CPU": 1.0}
RANK = {"GPU": 1.0, "CPU": 1.0}


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tensor, pipeline = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    per_node = draw(st.none() | st.integers(1, 12))
    across = draw(st.booleans()) or (per_node is not None and tensor > per_node)
    return ParallelLayout(tensor=tensor, pipeline=pipeline, gpus_per_node=per_node, tensor_across_nodes=across)


def node(name: str, gpus: float, cpus: float = 1000) -> NodeResources:
    return NodeResources(name, {"GPU": gpus, "CPU": cpus})


def plan(layout: ParallelLayout, launcher: LauncherKind = "torch_distributed") -> PlacementPlan:
    return plan_placement(layout, launcher, replica=REPLICA, rank=RANK)


@given(layout=layouts())
def test_a_plan_reserves_one_gpu_a_rank_and_the_replica_once(layout: ParallelLayout) -> None:
    planned = plan(layout)
    assert sum(planned.bundle_ranks) == layout.world_size
    assert sum(bundle.get("GPU", 0) for bundle in planned.bundles) == layout.world_size
    assert sum(bundle.get("CPU", 0) for bundle in planned.bundles) == layout.world_size + 1
    for room, bundle in zip(planned.bundle_ranks, planned.bundles, strict=True):
        assert bundle.get("GPU", 0) == room


@given(layout=layouts())
def test_no_node_gives_more_gpus_than_allowed_and_none_is_used_needlessly(layout: ParallelLayout) -> None:
    planned = plan(layout)
    per_node = layout.gpus_per_node or layout.world_size
    if planned.strategy == "STRICT_PACK":
        assert layout.world_size <= per_node
    else:
        assert max(planned.bundle_ranks) <= per_node
        assert all(more == planned.ranks_per_node for more in planned.bundle_ranks[:-1])
        whole = per_node - per_node % layout.tensor or per_node
        assert len(planned.bundles) == -(-layout.world_size // whole)


@given(layout=layouts(), data=st.data())
def test_ranks_are_ordered_by_stage_and_node(layout: ParallelLayout, data: st.DataObject) -> None:
    planned = plan(layout)
    count = len(planned.bundles)
    if planned.strategy == "STRICT_PACK":
        nodes = ["n0"] * count
    else:
        nodes = data.draw(st.permutations([f"n{i}" for i in range(count)]))
    order = order_ranks(planned, dict(enumerate(nodes)), replica_node=nodes[0])
    assert order.nodes[0] == nodes[0]
    assert [nodes[bundle] for bundle in order.bundles] == list(order.nodes)
    assert all(order.bundles.count(bundle) <= planned.bundle_ranks[bundle] for bundle in order.bundles)
    _assert_contiguous(order.nodes)
    if layout.gpus_per_node is None or layout.tensor <= layout.gpus_per_node:
        _assert_stages_whole(layout, order.nodes)


@given(layout=layouts(), data=st.data())
def test_any_placement_is_ordered_rightly_or_refused(layout: ParallelLayout, data: st.DataObject) -> None:
    """Also one that Ray should never give: bundles anywhere, the replica anywhere."""
    planned = plan(layout)
    nodes = st.sampled_from(["a", "b", "c"])
    where = {index: data.draw(nodes) for index in range(len(planned.bundles))}
    replica_node = data.draw(nodes)
    rooms = {name: sum(planned.bundle_ranks[i] for i in where if where[i] == name) for name in ("a", "b", "c")}
    torn = any(room % layout.tensor for room in rooms.values()) and not layout.tensor_across_nodes
    if torn or not rooms[replica_node]:
        with pytest.raises(PlacementError, match="STRICT_"):
            order_ranks(planned, where, replica_node)
        return
    order = order_ranks(planned, where, replica_node)
    assert order.nodes[0] == replica_node
    assert len(order.nodes) == layout.world_size
    assert sorted(order.bundles) == sorted(i for i, room in enumerate(planned.bundle_ranks) for _ in range(room))
    _assert_contiguous(order.nodes)
    if not layout.tensor_across_nodes:
        _assert_stages_whole(layout, order.nodes)


@given(layout=layouts(), gpus=st.lists(st.integers(0, 9), max_size=5), cpus=st.integers(1, 20))
def test_feasible_means_that_every_bundle_finds_a_node(layout: ParallelLayout, gpus: list[int], cpus: int) -> None:
    planned = plan(layout)
    assume(len(planned.bundles) <= 5 or planned.strategy == "STRICT_PACK")
    nodes = [node(f"n{i}", count, cpus) for i, count in enumerate(gpus)]
    if _brute_force(planned, nodes):
        check_feasible(planned, nodes)
        return
    with pytest.raises(PlacementError) as caught:
        check_feasible(planned, nodes)
    for each in nodes:
        assert f"node {each.node_id}: {each.total['GPU']:g} GPU" in str(caught.value)


@given(layout=layouts(), gpus=st.lists(st.integers(0, 9), max_size=6), more=st.integers(0, 9))
def test_another_node_never_makes_a_plan_infeasible(layout: ParallelLayout, gpus: list[int], more: int) -> None:
    planned = plan(layout)
    nodes = [node(f"n{i}", count) for i, count in enumerate(gpus)]
    try:
        check_feasible(planned, nodes)
    except PlacementError:
        return
    check_feasible(planned, [*nodes, node("more", more)])


def test_two_stages_on_two_nodes() -> None:
    planned = plan(ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2))
    assert planned.bundles == ({"CPU": 3.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 2.0})
    assert planned.strategy == "STRICT_SPREAD"
    order = order_ranks(planned, {0: "near", 1: "far"}, "near")
    assert order.bundles == (0, 0, 1, 1)
    assert order.nodes == ("near", "near", "far", "far")


def test_a_stage_that_does_not_fill_a_node_leaves_the_rest_of_it_alone() -> None:
    assert plan(ParallelLayout(tensor=3, pipeline=3, gpus_per_node=4)).bundle_ranks == (3, 3, 3)


def test_heterogeneous_nodes_are_matched_not_counted() -> None:
    planned = plan(ParallelLayout(tensor=2, pipeline=3, gpus_per_node=4))  # 4 GPUs here, 2 there
    check_feasible(planned, [node("small", 2), node("large", 4)])
    with pytest.raises(PlacementError, match=r"2 nodes: 1 with 4 GPU, 5 CPU, 1 with 2 GPU, 2 CPU.*node a: 3 GPU"):
        check_feasible(planned, [node("a", 3), node("b", 3)])


@pytest.mark.parametrize(
    ("layout", "launcher", "nodes", "remedy"),
    [
        (ParallelLayout(tensor=4), "torch_distributed", [], "start Ray on GPU nodes"),
        (ParallelLayout(tensor=4), "ray", [node("a", 2)], "lower tensor x pipeline to 2 or less .*add nodes"),
        (ParallelLayout(tensor=4), "ray", [node("a", 2), node("b", 2)], "lower tensor to 2: pipeline: 2 and gpus_per"),
        (ParallelLayout(tensor=2, pipeline=2), "ray", [node("a", 2), node("b", 2)], "set gpus_per_node: 2"),
        (ParallelLayout(tensor=2, pipeline=2), "mpi", [node("a", 2), node("b", 2)], "orchestrator ray"),
        (ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2), "ray", [node("a", 2)], r"add 1 node"),
        (ParallelLayout(tensor=2), "ray", [node("a", 2, cpus=1)], "ask for less of CPU"),
    ],
)
def test_an_impossible_plan_names_the_remedy(
    layout: ParallelLayout, launcher: LauncherKind, nodes: list[NodeResources], remedy: str
) -> None:
    with pytest.raises(PlacementError, match=remedy):
        check_feasible(plan(layout, launcher), nodes)


def test_no_spread_is_proposed_that_does_not_fit_either() -> None:
    """3 + 1 GPUs hold no two stages of two."""
    with pytest.raises(PlacementError) as caught:
        check_feasible(plan(ParallelLayout(tensor=2, pipeline=2), "ray"), [node("a", 3), node("b", 1)])
    remedy = str(caught.value).rpartition("; ")[2]
    assert remedy.startswith("lower tensor to 1: pipeline: 4 and gpus_per_node: 3, or lower tensor x pipeline to 3")


@given(layout=layouts(), gpus=st.lists(st.integers(1, 9), max_size=4), launcher=st.sampled_from(["ray", "mpi"]))
def test_whatever_is_proposed_is_feasible(layout: ParallelLayout, gpus: list[int], launcher: LauncherKind) -> None:
    layout = ParallelLayout(tensor=layout.tensor, pipeline=layout.pipeline)
    nodes = [node(f"n{i}", count) for i, count in enumerate(gpus)]
    try:
        check_feasible(plan(layout, launcher), nodes)
    except PlacementError as exc:
        remedy = str(exc).rpartition("; ")[2]
    else:
        return
    told = {name: int(number) for name, number in re.findall(r"(tensor to|pipeline:|gpus_per_node:) (\d+)", remedy)}
    if "gpus_per_node:" in told:
        proposed = ParallelLayout(
            tensor=told.get("tensor to", layout.tensor),
            pipeline=told.get("pipeline:", layout.pipeline),
            gpus_per_node=told["gpus_per_node:"],
        )
        assert proposed.world_size == layout.world_size
        check_feasible(plan(proposed, "ray"), nodes)
    smaller = re.search(r"tensor x pipeline to (\d+)", remedy)
    if smaller:
        check_feasible(plan(ParallelLayout(tensor=int(smaller[1])), launcher), nodes)


def test_launchers_refuse_what_they_cannot_start() -> None:
    with pytest.raises(PlacementError, match="use mpi or ray"):
        plan(ParallelLayout(tensor=2), "in_process")
    with pytest.raises(PlacementError, match="use ray"):
        plan(ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2), "mpi")
    with pytest.raises(ValidationError, match="talk across nodes"):
        ParallelLayout(tensor=4, gpus_per_node=2)


def test_single_host_launchers_give_the_gpus_to_the_process_that_holds_the_engine() -> None:
    alone = plan(ParallelLayout(), "in_process")
    assert alone.bundles == ({"CPU": 1.0, "GPU": 1.0},)
    assert alone.serve_options()["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1.0}
    spawned = plan(ParallelLayout(tensor=4), "mpi")
    assert spawned.bundles == ({"CPU": 5.0, "GPU": 4.0},)
    assert spawned.replica == spawned.bundles[0]
    apart = plan_placement(ParallelLayout(tensor=4), "mpi", replica=REPLICA, rank=RANK, own_environment=True)
    assert apart.bundles == ({"CPU": 1.0}, {"CPU": 4.0, "GPU": 4.0})
    assert apart.host_bundle == 1
    assert apart.serve_options()["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0}


def test_ranks_beside_the_replica_have_a_bundle_each() -> None:
    planned = plan(ParallelLayout(tensor=2), "ray")
    assert planned.bundles == ({"CPU": 1.0}, RANK, RANK)
    assert order_ranks(planned, dict.fromkeys(range(3), "a"), "a").bundles == (1, 2)


def test_an_unplaced_bundle_is_an_error() -> None:
    with pytest.raises(PlacementError, match=r"bundles \[1\]"):
        order_ranks(plan(ParallelLayout(tensor=2)), {0: "a", 1: "", 2: "a"}, "a")


def test_an_accelerator_is_asked_for_once_a_bundle() -> None:
    rank = RANK | {"accelerator_type:H100": 0.001}
    layout = ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2)
    planned = plan_placement(layout, "ray", replica=REPLICA | {"memory": 2**30}, rank=rank)
    assert planned.bundles[1] == {"GPU": 2.0, "CPU": 2.0, "accelerator_type:H100": 0.001}
    assert planned.bundles[0]["memory"] == 2**30
    assert actor_options(rank | {"lake": 2}) == {"num_cpus": 1.0, "num_gpus": 1.0, "resources": {"lake": 2}}


def _assert_contiguous(nodes: tuple[str, ...]) -> None:
    changes = sum(one != other for one, other in pairwise(nodes))
    assert changes == len(set(nodes)) - 1, f"ranks of one node are torn apart: {nodes}"


def _assert_stages_whole(layout: ParallelLayout, nodes: tuple[str, ...]) -> None:
    for stage in range(layout.pipeline):
        assert len(set(nodes[stage * layout.tensor : (stage + 1) * layout.tensor])) == 1


def _brute_force(planned: PlacementPlan, nodes: list[NodeResources]) -> bool:
    if planned.strategy == "STRICT_PACK":
        needs = [{name: sum(bundle.get(name, 0) for bundle in planned.bundles) for name in ("GPU", "CPU")}]
    else:
        needs = [dict(bundle) for bundle in planned.bundles]
    return any(
        all(
            need.get(name, 0) <= chosen.total[name] for need, chosen in zip(needs, choice, strict=True) for name in need
        )
        for choice in permutations(nodes, len(needs))
    )
