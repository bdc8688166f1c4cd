"""A group of two tensor-parallel ranks x two pipeline stages over two nodes, and the loss of one of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from serve.core.group_state import from_line, replay
from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementError, check_feasible, order_ranks
from serve.workers.processes import start_ticks
from tests.integration.group_cluster import GroupCluster, processes_of, small_plan, until

# Ray's cluster utilities leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

LAYOUT = ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2)
PLAN = small_plan(LAYOUT)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupCluster]:
    running = GroupCluster(tmp_path_factory.mktemp("nodes"))
    try:
        running.add_node(gpus=2)
        yield running
    finally:
        running.end()


def test_what_cannot_be_placed_is_refused_before_anything_is_taken(cluster: GroupCluster) -> None:
    with pytest.raises(
        PlacementError, match=r"no room for tensor=2 x pipeline=2.*2 GPU.*add nodes that have all of it"
    ):
        check_feasible(PLAN, cluster.nodes())  # the head has no GPU


def test_a_lost_node_fails_the_group_which_comes_back_with_another_node(cluster: GroupCluster) -> None:
    cluster.add_node(gpus=2)
    check_feasible(PLAN, cluster.nodes())
    handle = cluster.deploy(PLAN)
    group = cluster.describe(handle)
    _assert_placed_as_planned(group)
    assert -1.0 not in handle.run.remote("five", 5).result()  # tokens that came together are one

    # The node that has the second stage, but not the replica.
    lost = next(node for node in cluster.gpu_nodes() if node.node_id != group["node"])
    everything = processes_of(group["id"])
    stream = handle.run.remote("broken", 100_000)
    until(lambda: len(handle.run.remote("probe", 2).result()) == 2, "it does not serve")
    cluster.kill_node(lost)
    assert stream.result()[-2] == -1.0, "the stream did not end with EngineDead"
    log = [from_line(line) for line in cluster.log_lines(group["id"])]
    states = [state.state.value for state in replay(log)]
    assert "ready" in states  # and `degraded` perhaps, if a rank fell silent before Ray said that it is dead
    assert states[-3:] == ["failed", "failed", "stopped"]
    until(lambda: not any(start_ticks(pid) for pid in everything), "a rank survived the loss of a node")

    cluster.add_node(gpus=2)
    returned = cluster.until_replaced(handle, group["id"])
    _assert_placed_as_planned(returned)
    assert -1.0 not in handle.run.remote("again", 5).result()  # tokens that came together are one

    # Now the node of the replica and rank 0.
    lost = next(node for node in cluster.gpu_nodes() if node.node_id == returned["node"])
    everything = processes_of(returned["id"]) | {returned["pid"]: None}
    cluster.kill_node(lost)
    until(lambda: not any(start_ticks(pid) for pid in everything), "a rank survived the loss of the replica's node")
    cluster.add_node(gpus=2)
    _assert_placed_as_planned(cluster.until_replaced(handle, returned["id"]))


def _assert_placed_as_planned(group: dict[str, Any]) -> None:
    nodes = [rank["node_id"] for rank in group["ranks"]]
    bundles = {0: group["node"], 1: next(node for node in nodes if node != group["node"])}
    assert nodes == list(order_ranks(PLAN, bundles, group["node"]).nodes)
    assert nodes[0] == nodes[1] == group["node"]
    assert nodes[2] == nodes[3] != group["node"]
