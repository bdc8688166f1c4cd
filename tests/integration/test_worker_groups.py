"""Worker groups on a real Ray node: killed, stopped and orphaned ranks, with Serve around them."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from serve.core.group_state import LogEntry, from_line, replay
from serve.core.parallel import ParallelLayout
from serve.workers.group_settings import GroupSettings
from serve.workers.processes import start_ticks
from tests.integration.group_cluster import (
    ENGINE,
    QUICKSTART,
    GroupCluster,
    ProgramWithChildren,
    WedgingProgram,
    processes_of,
    small_plan,
    until,
)

# Ray's cluster utilities leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

PAIR = small_plan(ParallelLayout(tensor=2))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupCluster]:
    running = GroupCluster(tmp_path_factory.mktemp("groups"))
    try:
        running.add_node(gpus=2)
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def handle(cluster: GroupCluster) -> Any:
    """One deployment that every test finds ready, however the test before left it."""
    return cluster.deploy(PAIR, ProgramWithChildren(ENGINE, QUICKSTART))


def ready(cluster: GroupCluster, handle: Any) -> dict[str, Any]:
    group = cluster.until_replaced(handle, "")
    until(lambda: len(processes_of(group["id"])) == 4, "the ranks and their children did not all start")
    return group


def pid_of(group: dict[str, Any], rank: int) -> int:
    return int(group["ranks"][rank]["pid"])


def entries_of(cluster: GroupCluster, group: dict[str, Any]) -> list[LogEntry]:
    return [from_line(line) for line in cluster.log_lines(group["id"])]


def test_ranks_are_processes_with_a_bundle_each(cluster: GroupCluster, handle: Any) -> None:
    group = ready(cluster, handle)
    assert [rank["rank"] for rank in group["ranks"]] == [0, 1]
    assert {rank["node_id"] for rank in group["ranks"]} == {group["node"]}
    assert len({group["pid"], pid_of(group, 0), pid_of(group, 1)}) == 3
    assert len(handle.run.remote("five", 5).result()) == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_group_and_serve_replaces_it(cluster: GroupCluster, handle: Any, rank: int) -> None:
    group = ready(cluster, handle)
    everything = processes_of(group["id"])
    stream = handle.run.remote("broken", 100_000)
    until(lambda: len(handle.run.remote("probe", 2).result()) == 2, "it does not serve")
    os.kill(pid_of(group, rank), signal.SIGKILL)
    assert stream.result()[-2] == -1.0, "the stream did not end with EngineDead"
    cluster.until_replaced(handle, group["id"])
    assert not [pid for pid in everything if start_ticks(pid) is not None]
    log = entries_of(cluster, group)
    states = [state.state.value for state in replay(log)]
    assert "ready" in states
    assert states[-3:] == ["failed", "failed", "stopped"]
    assert len(handle.run.remote("again", 5).result()) == 5


def test_a_stopped_rank_is_lost_and_killed(cluster: GroupCluster, handle: Any) -> None:
    group = ready(cluster, handle)
    everything = processes_of(group["id"])
    os.kill(pid_of(group, 1), signal.SIGSTOP)
    cluster.until_replaced(handle, group["id"])
    assert not [pid for pid in everything if start_ticks(pid) is not None]
    states = [entry.after.state.value for entry in entries_of(cluster, group)]
    assert states[-4:] == ["degraded", "failed", "failed", "stopped"]
    assert "no sign of life" in entries_of(cluster, group)[-1].after.reason


@pytest.mark.parametrize("stopped_first", [False, True])
def test_nothing_survives_a_killed_replica(cluster: GroupCluster, handle: Any, stopped_first: bool) -> None:
    """Not a rank that is stopped and so cannot hear of it, nor what ranks started in sessions of their own."""
    group = ready(cluster, handle)
    everything = processes_of(group["id"])
    if stopped_first:
        os.kill(pid_of(group, 1), signal.SIGSTOP)
    os.kill(group["pid"], signal.SIGKILL)
    until(lambda: not any(start_ticks(pid) for pid in everything), "a process survived")
    assert not processes_of(group["id"])
    cluster.until_replaced(handle, group["id"])


def test_nothing_survives_a_killed_replica_whose_reaper_was_killed_too(cluster: GroupCluster, handle: Any) -> None:
    """Ray ends the ranks of a dead owner; what these started is killed by their own reapers."""
    group = ready(cluster, handle)
    for reaper in reapers_of(group["id"], rank=""):
        os.kill(reaper, signal.SIGKILL)
    os.kill(group["pid"], signal.SIGKILL)
    until(lambda: not processes_of(group["id"]), f"alive: {processes_of(group['id'])}")
    cluster.until_replaced(handle, group["id"])


def test_a_deleted_deployment_leaves_nothing(cluster: GroupCluster, handle: Any) -> None:
    group = ready(cluster, handle)
    cluster.delete()
    until(lambda: not processes_of(group["id"]), f"alive: {processes_of(group['id'])}")
    until(lambda: not reapers_of(group["id"]), "a reaper outlived what it was for")


def test_a_rank_whose_program_hangs_is_lost(cluster: GroupCluster, handle: Any) -> None:
    settings = GroupSettings(token_limit_s=1.0)
    group = cluster.describe(cluster.deploy(PAIR, WedgingProgram(ENGINE, QUICKSTART), settings))
    reason = entries_of(cluster, group)[-1].after.reason
    assert "rank 1: its process lives, but its program has not advanced for 1." in reason
    until(lambda: not processes_of(group["id"]), f"alive: {processes_of(group['id'])}")
    cluster.delete()


def reapers_of(group: str, rank: str | None = None) -> list[int]:
    """Return the reapers of a group, or of one of its owners."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().decode().split("\0")
        except OSError:
            continue
        if "reaper.py" in " ".join(words) and group in words:
            place = words.index(group)
            if rank is None or words[place + 1] == rank:
                found.append(int(name))
    return found
