"""RayOrchestratorLauncher on two Ray nodes of this machine, with GPUs that are none."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementPlan, plan_placement
from serve.errors import ConfigError
from tests.doubles.install import LineName, double_environ
from tests.integration.ray_orchestrated import Host, TrtllmReplica

QUICKSTART = Path(__file__).parents[2] / "serve/models/quickstart"
TWO_NODES = ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    try:
        for _ in range(2):
            running.add_node(num_cpus=4, num_gpus=2, object_store_memory=80_000_000)
        ray.init(address=running.address, logging_level="ERROR", runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
        yield running
    finally:
        ray.shutdown()
        running.shutdown()


def plan(cpus: float = 1.0) -> PlacementPlan:
    return plan_placement(TWO_NODES, "ray", replica={"CPU": 0.5}, rank={"GPU": 1, "CPU": cpus})


@pytest.fixture
def host(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Places a replica as Serve would, in bundle 0 of a group of its own."""
    made: list[tuple[Any, Any]] = []

    def make(models: tuple[str, ...] = (), cpus: float = 1.0, line: LineName | None = None) -> Any:
        reserved = plan(cpus)
        group = ray.util.placement_group([dict(bundle) for bundle in reserved.bundles], strategy=reserved.strategy)
        ray.get(group.ready(), timeout=WAIT_S)
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        placed = {"num_cpus": 0.5, "scheduling_strategy": strategy}
        if line is None:
            actor = ray.remote(Host).options(**placed).remote(reserved, models)
        else:
            environ = double_environ(line, {}) | {"TRTLLM_DOUBLE_STEP_S": "0.02", "OMP_NUM_THREADS": "1"}
            placed["runtime_env"] = {"env_vars": environ}
            actor = ray.remote(TrtllmReplica).options(**placed).remote(reserved, QUICKSTART)
        made.append((actor, group))
        return actor

    yield make
    for actor, group in made:
        ray.kill(actor)
        ray.util.remove_placement_group(group)


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def test_trap_7_6_31_and_34_ranks_are_placed_found_and_watched_on_both_nodes(host: Callable[..., Any]) -> None:
    replica = host()
    here, found, places = ray.get(replica.launch.remote(), timeout=WAIT_S)
    nodes = [process["node_id"] for process in found]
    assert nodes[0] == nodes[1] == here, "rank 0 has to be on the replica's node"
    assert nodes[2] == nodes[3] != here
    assert [process["rank"] for process in found] == [0, 1, 2, 3]
    assert sorted((node, process["pid"]) for node, process in zip(nodes, found, strict=True)) == sorted(places)
    wait_until(lambda: {2, 3} <= set(ray.get(replica.told.remote())[1]))
    assert not {0, 1} & set(ray.get(replica.told.remote())[1]), "those here are watched by their processes"

    os.kill(found[2]["pid"], signal.SIGSTOP)
    at_the_stop = ray.get(replica.told.remote())[1]
    wait_until(lambda: ray.get(replica.told.remote())[1][3] >= at_the_stop[3] + 4)
    assert ray.get(replica.told.remote())[1][2] <= at_the_stop[2] + 1, "a stopped rank does not beat"
    os.kill(found[3]["pid"], signal.SIGKILL)
    wait_until(lambda: [rank for rank, _ in ray.get(replica.told.remote())[0]] == [3])

    ray.get(replica.end.remote(0.2), timeout=WAIT_S)
    assert all(is_gone(process["pid"]) for process in found)


def test_trap_4_3b_every_node_has_the_models_or_the_node_and_the_path_are_named(
    host: Callable[..., Any], tmp_path: Path
) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(ConfigError, match=rf"node [0-9a-f]{{8}}: {missing}: there is no such directory"):
        ray.get(host((str(tmp_path), str(missing))).launch.remote(), timeout=WAIT_S)


def test_trap_4_2_a_rank_without_a_whole_cpu_would_never_be_placed(host: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"resources\.num_cpus=0\.5: .*takes one CPU"):
        ray.get(host(cpus=0.5).launch.remote(), timeout=WAIT_S)


def test_a_replica_without_a_placement_group_is_told_so(cluster: Cluster) -> None:
    actor = ray.remote(Host).remote(plan(), ())
    with pytest.raises(ConfigError, match="needs a placement group"):
        ray.get(actor.launch.remote(), timeout=WAIT_S)


@pytest.mark.parametrize("line", ["1.2.x", "newest"])
def test_trap_7_6_34_a_rank_killed_on_another_node_ends_the_group_in_both_lines(
    host: Callable[..., Any], line: LineName
) -> None:
    replica = host(line=line)
    engine, ranks, deltas, reason = ray.get(replica.stream_until_a_rank_dies.remote(), timeout=120)
    assert engine.startswith("tensorrt-llm")
    assert [process["rank"] for process in ranks] == [0, 1, 2, 3]
    assert len({process["node_id"] for process in ranks}) == 2
    assert deltas >= 5
    assert "rank 3" in reason
    wait_until(lambda: all(is_gone(process["pid"]) for process in ranks))
