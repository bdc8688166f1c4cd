"""The numbers of routing: decisions, events, memory, and the simulator's own speed. `make bench-routing`.

    python -m benchmarks.routing [--trace mooncake_fast25_conversation.jsonl.xz]

About five minutes. Decisions are the whole of it: hash the prompt's tokens, match the blocks against the index, score
every replica, rank them. Without a trace, the simulator is timed on a synthetic workload of the same size.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import event_plane, routing_index
from benchmarks.report import Report
from benchmarks.routing_decision import time_decisions, time_policies
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.settings import POLICY_NAMES, make_policy, parse_policy
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from sim.simulator import simulate
from sim.workload_file import read_workload

SYNTHETIC = Path(__file__).parents[1] / "configs/workloads/chat.yaml"
REQUESTS = 12_031


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trace", type=Path, help="what the simulator is timed on")
    parser.add_argument("--quick", action="store_true", help="leave out what routing_index and event_plane measure")
    arguments = parser.parse_args(argv)
    shown = f" --trace {arguments.trace.name}" if arguments.trace else ""
    shown += " --quick" if arguments.quick else ""
    report = Report("routing", f"python -m benchmarks.routing{shown}")
    _decisions(report)
    for figure in () if arguments.quick else (*routing_index.measure(), *event_plane.measure()):
        report.add(figure.name, figure.value, figure.unit, figure.hold)
    _simulator(report, arguments.trace or SYNTHETIC)
    report.finish()


def _decisions(report: Report) -> None:
    small = time_decisions(PredictivePolicy(), 64, 8192, 1000)
    report.add("decision, 8k tokens, 64 replicas, p50", 1e6 * small.p50_s, "us", "<= 150")
    report.add("the same, p99", 1e6 * small.p99_s, "us")
    report.add("of it hashing", 1e6 * small.hash_s, "us")
    report.add("reservation after it", 1e6 * small.commit_s, "us")
    large = time_decisions(PredictivePolicy(), 1000, 131_072, 300)
    report.add("decision, 128k tokens, 1,000 replicas, p50", 1e3 * large.p50_s, "ms", "<= 3")
    report.add("the same, p99", 1e3 * large.p99_s, "ms")
    makers = {name: partial(make_policy, parse_policy(name)) for name in POLICY_NAMES}
    slowest = max(time_policies(makers, 64, 8192).items(), key=lambda item: item[1])
    report.add(f"decision of the slowest policy, {slowest[0]}, 8k tokens, 64 replicas, p50", 1e6 * slowest[1], "us")


def _simulator(report: Report, trace: Path) -> None:
    workload = read_workload(trace, limit=REQUESTS)
    engine = SimulatedSettings(
        tokens_per_block=workload.tokens_per_block, context_tokens=1 << 20, latency=RooflineSettings()
    )
    began_s = time.perf_counter()
    simulate(workload.requests, [engine] * 16, PredictivePolicy())
    wall_s = time.perf_counter() - began_s
    report.add(
        f"simulating {workload.name}, {len(workload.requests)} requests, {workload.duration_s:.0f} s, 16 replicas",
        wall_s,
        "s",
        "<= 30",
    )


if __name__ == "__main__":
    main()
