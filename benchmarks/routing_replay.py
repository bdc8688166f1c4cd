"""Every routing policy on the same traffic, in many settings: `make bench-routing-replay TRACE=... [LIMIT=6000]`.

    python -m benchmarks.routing_replay [--trace FILE ...] [--limit N] [--jobs N]

Simulated engines (the roofline latency model of H100s, calibrated on published TensorRT-LLM figures), virtual time, the
production's routing code. Without traces, the synthetic workloads of configs/workloads are replayed. A setting is a
workload, a model, a number of replicas, the size of their KV caches and how much of the fleet's capacity the traffic
asks for: the arrival times are compressed until the least loaded policy's engines would be busy for that share of the
time if every prompt were computed whole.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.report import RESULTS, Report
from serve.core.routing.settings import POLICY_NAMES, make_policy, parse_policy
from serve.engines.simulated.latency import StepShape
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from sim.metrics import Summary, summarize
from sim.options import SimOptions
from sim.simulator import simulate
from sim.slo import Slo
from sim.workload import Workload
from sim.workload_file import read_workload

SYNTHETIC = sorted((Path(__file__).parents[1] / "configs/workloads").glob("*.yaml"))
MODELS = {
    "8b": (RooflineSettings(model="llama-3.1-8b"), Slo(ttft_ms=2000, tpot_ms=50)),
    "70b": (RooflineSettings(model="llama-3.3-70b", tensor_parallel=4), Slo(ttft_ms=4000, tpot_ms=80)),
}
OURS = "predictive"
MAX_SPREAD = 1.3
WITHIN = 0.02


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        workload: Path of the trace, or of a description.
        limit: Requests of it.
        model: Key of `MODELS`.
        replicas: How many.
        cache: Share of the KV blocks that the GPUs have room for.
        load: Share of the fleet's capacity that the traffic asks for, without any prefix hit.
        policy: Which.
    """

    workload: Path
    limit: int
    model: str
    replicas: int
    cache: float
    load: float
    policy: str = ""

    @property
    def label(self) -> str:
        """For the table."""
        name = self.workload.name.split(".")[0]
        return f"{name} {self.model} x{self.replicas} cache {self.cache:g} load {self.load:g}"


def settings(workloads: Sequence[Path], limit: int) -> list[Setting]:
    """Return all settings: replica counts, cache sizes, loads and models change in turn."""
    grid = [
        ("8b", 4, 1.0, 0.4),
        ("8b", 4, 1.0, 0.8),
        ("8b", 4, 1.0, 1.0),
        ("8b", 8, 0.25, 0.8),
        ("8b", 16, 1.0, 0.15),
        ("8b", 16, 1.0, 0.6),
        ("8b", 16, 1.0, 0.9),
        ("8b", 16, 4.0, 0.9),
        ("70b", 4, 1.0, 0.5),
        ("70b", 8, 1.0, 0.8),
        ("70b", 16, 0.25, 0.7),
    ]
    return [Setting(workload, limit, *row) for workload in workloads for row in grid]


_workloads: dict[tuple[Path, int], Workload] = {}  # of this process: cases are many, workloads few


def _workload(setting: Setting) -> Workload:
    key = setting.workload, setting.limit
    if key not in _workloads:
        _workloads[key] = read_workload(setting.workload, limit=setting.limit)
    return _workloads[key]


def _engine(setting: Setting, tokens_per_block: int) -> SimulatedSettings:
    engine = SimulatedSettings(
        tokens_per_block=tokens_per_block, context_tokens=1 << 20, latency=MODELS[setting.model][0]
    )
    blocks = max(1, int(engine.make_limits().total_blocks * setting.cache))
    return engine.model_copy(update={"total_blocks": blocks})


def _work_s(workload: Workload, engine: SimulatedSettings) -> float:
    """Return engine time of all requests if nothing is cached and 32 of them are always decoded together."""
    latency, total_s = engine.latency.make_model(), 0.0
    for request in workload.requests:
        tokens, output = request.prompt_tokens, request.output_tokens
        pairs = tokens * (tokens + 1) / 2
        empty_s = latency.step_s(StepShape(8192))
        total_s += latency.step_s(StepShape(8192 + tokens, pairs, 1)) - empty_s
        total_s += output * latency.step_s(StepShape(0, 0.0, 0, 32, 32 * tokens)) / 32
    return total_s


def run_case(setting: Setting) -> tuple[Setting, Summary]:
    """Simulate one policy in one setting."""
    workload = _workload(setting)
    engine, slo = _engine(setting, workload.tokens_per_block), MODELS[setting.model][1]
    span_s = workload.requests[-1].arrival_s - workload.requests[0].arrival_s
    rate = setting.load * setting.replicas * span_s / _work_s(workload, engine)
    policy, began_s = make_policy(parse_policy(setting.policy)), time.perf_counter()
    outcome = simulate(workload.faster(rate).requests, [engine] * setting.replicas, policy, SimOptions())
    return setting, summarize(outcome, setting.policy, slo, wall_s=time.perf_counter() - began_s)


def _cases(chosen: Sequence[Setting], policies: Sequence[str]) -> list[Setting]:
    return [replace(setting, policy=name) for setting in chosen for name in policies]


def _run(cases: Sequence[Setting], jobs: int) -> Iterator[tuple[Setting, Summary]]:
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        for number, result in enumerate(processes.map(run_case, cases), 1):
            print(f"\r{number}/{len(cases)} simulated", end="", file=sys.stderr, flush=True)
            yield result
    print(file=sys.stderr)


def _table(label: str, slo: Slo, rows: Sequence[Summary]) -> str:
    best_ttft_s = min(row.ttft_s.p90 for row in rows)
    best_good = max(row.goodput_share for row in rows)
    lines = [
        f"{label}: goodput is TTFT <= {slo.ttft_ms:g} ms and TPOT <= {slo.tpot_ms:g} ms",
        f"  {'policy':16} {'hit %':>6} {'TTFT p50':>9} {'p90 ms':>9} {'over best':>9} {'p99':>9} {'TPOT p90':>8} "
        f"{'good %':>7} {'of best':>8} {'spread':>6} {'busy':>5}",
    ]
    for row in rows:
        ttft_s = row.ttft_s
        lines.append(
            f"  {row.policy:16} {100 * row.hit_rate:6.1f} {1e3 * ttft_s.p50:9.0f} {1e3 * ttft_s.p90:9.0f} "
            f"{ttft_s.p90 / best_ttft_s:9.2f} {1e3 * ttft_s.p99:9.0f} {1e3 * row.tpot_s.p90:8.1f} "
            f"{100 * row.goodput_share:7.2f} {row.goodput_share / best_good:8.3f} {row.spread_requests:6.2f} "
            f"{row.spread_busy:5.2f}"
        )
    return "\n".join(lines)


def _plot(path: Path, results: Sequence[tuple[str, list[Summary]]], policies: Sequence[str]) -> None:
    """Draw, for each policy, its TTFT p90 over the best and its goodput of the best, in all settings."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for number, name in enumerate(policies):
        over, good = [], []
        for _, rows in results:
            row = next(row for row in rows if row.policy == name)
            over.append(row.ttft_s.p90 / min(other.ttft_s.p90 for other in rows))
            good.append(row.goodput_share / max(other.goodput_share for other in rows))
        color = "#e45756" if name == OURS else "#4c78a8"
        for axes, values in ((left, over), (right, good)):
            axes.plot(values, np.full(len(values), number), "o", color=color, alpha=0.5)
            axes.plot(float(np.median(values)), number, "|", color="black", markersize=14)
    left.set(xscale="log", xlabel="TTFT p90, over the best policy of the setting (1 is best)")
    right.set(xlabel="goodput, as a share of the best policy's (1 is best)")
    left.set_yticks(range(len(policies)), policies)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{len(results)} settings, a dot each; bars are medians. Simulated engines.")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print the tables and write them to benchmarks/results."""
    parser = argparse.ArgumentParser(description="Every routing policy on the same traffic, in many settings.")
    parser.add_argument("--trace", type=Path, action="append", help="may be given several times")
    parser.add_argument("--limit", type=int, default=6000, help="requests of each workload")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--policies", default=",".join(POLICY_NAMES), help="names, separated by commas")
    parser.add_argument("--name", default="routing_replay", help="of the result files")
    arguments = parser.parse_args(argv)
    policies = arguments.policies.split(",")
    workloads: list[Path] = arguments.trace or list(SYNTHETIC)
    shown = " ".join(f"--trace {path.name}" for path in arguments.trace or ())
    report = Report(arguments.name, f"python -m benchmarks.routing_replay {shown} --limit {arguments.limit}")
    grouped: dict[str, list[Summary]] = {}
    slos: dict[str, Slo] = {}
    for setting, summary in _run(_cases(settings(workloads, arguments.limit), policies), arguments.jobs):
        grouped.setdefault(setting.label, []).append(summary)
        slos[setting.label] = MODELS[setting.model][1]
    over, lost, spread = [], [], []
    for label, rows in grouped.items():
        report.note(_table(label, slos[label], rows) + "\n")
        ours = next(row for row in rows if row.policy == OURS)
        over.append(ours.ttft_s.p90 / min(row.ttft_s.p90 for row in rows) - 1.0)
        lost.append(1.0 - ours.goodput_share / max(row.goodput_share for row in rows))
        spread.append(ours.spread_requests)
    report.add(
        f"{OURS}: TTFT p90 over the best, worst of {len(over)} settings", 100 * max(over), "%", f"<= {100 * WITHIN}"
    )
    report.add(f"{OURS}: goodput below the best, worst", 100 * max(lost), "%", f"<= {100 * WITHIN}")
    report.add(f"{OURS}: spread of requests (max / mean), worst", max(spread), "x", f"<= {MAX_SPREAD}")
    report.add(f"{OURS}: settings in which its TTFT p90 is the best", sum(1 for o in over if o <= 0.0), "settings")
    report.add(f"{OURS}: settings in which its goodput is the best", sum(1 for o in lost if o <= 0.0), "settings")
    report.finish()
    _plot(RESULTS / f"{arguments.name}.png", list(grouped.items()), policies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
