"""Worker groups: how soon a failure is noticed, streams are cut, the ranks are gone, and a new group serves.

    python -m benchmarks.workers

Two Ray nodes on this machine whose GPUs are none, a group of tensor 2 x pipeline 2 over both with the simulated engine,
and a Serve deployment around it. Each figure is the median of the runs. The load of 64 streams is there while the fault
happens.
"""

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Report
from serve.core.group_state import GroupState, LogEntry, from_line
from serve.core.parallel import ParallelLayout
from serve.core.request import TokenDelta
from serve.workers.streams import StreamGuard
from tests.integration.group_cluster import GroupCluster, processes_of, small_plan, until

RUNS = 3
STREAMS = 64
DELTAS = 200_000
PLAN = small_plan(ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2))


@dataclass(frozen=True)
class Timeline:
    """Seconds after the fault."""

    name: str
    log: tuple[tuple[float, str], ...]
    detected_s: float
    streams_cut_s: float
    ranks_gone_s: float
    stopped_s: float
    serves_again_s: float


def main() -> None:
    """Run everything."""
    report = Report("workers", "python -m benchmarks.workers")
    report.add("cost of the guard, per delta", asyncio.run(guard_cost_us()), "us", "<= 2")
    with tempfile.TemporaryDirectory() as directory:
        cluster = GroupCluster(Path(directory))
        try:
            timelines = run_faults(cluster)
        finally:
            cluster.end()
    for name in dict.fromkeys(timeline.name for timeline in timelines):
        add_figures(report, [timeline for timeline in timelines if timeline.name == name])
    report.note(
        "`serves again` is mostly the start of five Python processes, on a machine with load average "
        f"{os.getloadavg()[1]:.0f} over the last five minutes."
    )
    for timeline in {timeline.name: timeline for timeline in timelines}.values():
        report.note(describe(timeline))
    report.finish()
    save_plot(timelines)


def run_faults(cluster: GroupCluster) -> list[Timeline]:
    """Provoke each fault several times."""
    cluster.add_node(gpus=2)
    cluster.add_node(gpus=2)
    handle = cluster.deploy(PLAN)
    faults: dict[str, Callable[[dict[str, Any]], None]] = {
        "kill -9 of a rank on the replica's node": lambda group: signal_rank(group, 1, signal.SIGKILL),
        "kill -9 of a rank on another node": lambda group: signal_rank(group, 3, signal.SIGKILL),
        "kill -STOP of a rank on the replica's node": lambda group: signal_rank(group, 1, signal.SIGSTOP),
        "kill -STOP of a rank on another node": lambda group: signal_rank(group, 3, signal.SIGSTOP),
        "loss of a node; another one comes 3 s later": lambda group: lose_node(cluster, group),
    }
    found = []
    for name, fault in faults.items():
        for _ in range(RUNS):
            found.append(measure(cluster, handle, name, fault))
            print(describe(found[-1]), flush=True)
    return found


def measure(cluster: GroupCluster, handle: Any, name: str, fault: Callable[[dict[str, Any]], None]) -> Timeline:
    """Let one fault happen under load, and follow what becomes of the group."""
    group = cluster.until_replaced(handle, "")
    streams = [handle.run.remote(f"s{number}", 12_000) for number in range(STREAMS)]
    until(lambda: len(handle.run.remote("probe", 20).result()) == 20, "it does not serve")
    fault_s = time.monotonic()
    fault(group)
    cut_s = max(stream.result(timeout_s=60)[-1] for stream in streams) - fault_s
    until(lambda: not processes_of(group["id"]), "ranks survive")
    gone_s = time.monotonic() - fault_s
    if "node" in name and "loss" in name:
        time.sleep(max(0.0, fault_s + 3.0 - time.monotonic()))
        cluster.add_node(gpus=2)
    cluster.until_replaced(handle, group["id"])
    until(lambda: len(handle.run.remote("probe", 1).result()) == 1, "it does not serve again")
    again_s = time.monotonic() - fault_s
    log = [from_line(line) for line in cluster.log_lines(group["id"])]
    after = [entry for entry in log if entry.at_s >= fault_s]
    told = tuple((entry.at_s - fault_s, tell(entry)) for entry in after)
    detected_s = next(entry.at_s for entry in after if entry.after.state is GroupState.FAILED) - fault_s
    return Timeline(name, told, detected_s, cut_s, gone_s, after[-1].at_s - fault_s, again_s)


def tell(entry: LogEntry) -> str:
    """Say in a few words what an entry of the log is about."""
    return f"{type(entry.event).__name__} -> {entry.after.state.value}"


def signal_rank(group: dict[str, Any], rank: int, number: signal.Signals) -> None:
    """Send a signal to a rank."""
    os.kill(group["ranks"][rank]["pid"], number)


def lose_node(cluster: GroupCluster, group: dict[str, Any]) -> None:
    """Kill the raylet of the node that has the second stage."""
    far = group["ranks"][3]["node_id"]
    cluster.kill_node(next(node for node in cluster.gpu_nodes() if node.node_id == far))


def add_figures(report: Report, runs: list[Timeline]) -> None:
    """Add the medians of one fault."""
    name = runs[0].name
    holds = {"detected": "<= 3", "streams cut": "<= 3"}
    for what, values in (
        ("detected", [run.detected_s for run in runs]),
        ("streams cut", [run.streams_cut_s for run in runs]),
        ("no process left", [run.ranks_gone_s for run in runs]),
        ("stopped, memory free", [run.stopped_s for run in runs]),
        ("serves again", [run.serves_again_s for run in runs]),
    ):
        report.add(f"{name}: {what}", statistics.median(values), "s", holds.get(what, ""))


def describe(timeline: Timeline) -> str:
    """Return one run as a line of text."""
    events = "; ".join(f"{at_s:.2f} s {event}" for at_s, event in timeline.log)
    return (
        f"{timeline.name}: {events}; {timeline.streams_cut_s:.2f} s all {STREAMS} streams have raised EngineDead; "
        f"{timeline.ranks_gone_s:.2f} s no process left; {timeline.serves_again_s:.2f} s serves again"
    )


def save_plot(timelines: list[Timeline]) -> None:
    """Draw the last run of each fault."""
    from matplotlib import pyplot

    last = {timeline.name: timeline for timeline in timelines}
    figure, axes = pyplot.subplots(figsize=(9, 0.7 * len(last) + 1.2), layout="constrained")
    parts = (
        ("until detected", "tab:red", lambda run: (0.0, run.detected_s)),
        ("streams cut, ranks killed, memory free", "tab:orange", lambda run: (run.detected_s, run.stopped_s)),
        ("Serve starts another group", "tab:blue", lambda run: (run.stopped_s, run.serves_again_s)),
    )
    for label, colour, span in parts:
        spans = [span(run) for run in last.values()]
        lengths, lefts = [end - begin for begin, end in spans], [begin for begin, _ in spans]
        axes.barh(list(last), lengths, left=lefts, color=colour, label=label, height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("seconds after the fault")
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(RESULTS / "workers.png", dpi=110)


async def guard_cost_us() -> float:
    """Return what the guard adds to each delta of a stream, in microseconds."""
    guard = StreamGuard(lambda reason: None, lambda tokens, seconds: None)
    guard.open()
    delta = TokenDelta((1,))

    async def source() -> Any:
        for _ in range(DELTAS):
            yield delta

    async def drain(stream: Any) -> float:
        begin_s = time.perf_counter()
        async for _ in stream:
            pass
        return time.perf_counter() - begin_s

    costs = [await drain(guard.deltas_of(source, 8)) - await drain(source()) for _ in range(5)]
    return min(costs) / DELTAS * 1e6


if __name__ == "__main__":
    main()
