"""`raytrt simulate`: replay a trace through simulated replicas, and compare routing policies."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from serve.core.strict_model import describe_mistakes
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from serve.errors import ConfigError
from sim.metrics import Summary, summarize
from sim.options import SimOptions
from sim.policies import parse_candidates
from sim.simulator import simulate
from sim.slo import Slo
from sim.table import format_table
from sim.workload import Workload
from sim.workload_mooncake import read_mooncake


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="raytrt simulate", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ConfigError as exc:
        print(f"raytrt simulate: {exc}", file=sys.stderr)
        return 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--policy", default="predictive,round_robin")
    parser.add_argument("--replicas", default="16", help="e.g. 4,8,16")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--weights", default="fp8")
    parser.add_argument("--tokens-per-block", type=int, default=512)
    parser.add_argument("--cache-blocks", type=int)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    parser.add_argument("--gpu-dollars-per-hour", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    try:
        engine = SimulatedSettings(
            tokens_per_block=options.tokens_per_block,
            total_blocks=options.cache_blocks,
            latency=RooflineSettings(
                model=options.model,
                gpu=options.gpu,
                tensor_parallel=options.tensor_parallel,
                weights=options.weights,
            ),
        )
        sim_options = SimOptions(gateways=options.gateways, max_tokens=options.max_tokens, seed=options.seed)
        slo = Slo(ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, "")) from None
    candidates = parse_candidates(options.policy)
    workload: Workload = read_mooncake(options.trace, options.tokens_per_block, limit=options.limit)
    workload = workload.faster(options.rate)
    summaries: list[Summary] = []
    for replicas in (int(count) for count in options.replicas.split(",")):
        for candidate in candidates:
            began_s = time.perf_counter()
            outcome = simulate(workload.requests, [engine] * replicas, candidate.make(), sim_options)
            summary = summarize(
                outcome,
                candidate.label,
                slo,
                gpus_per_replica=options.tensor_parallel,
                gpu_dollars_per_hour=options.gpu_dollars_per_hour,
                wall_s=time.perf_counter() - began_s,
            )
            summaries.append(summary)
    print(json.dumps([asdict(s) for s in summaries]) if options.json else format_table(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
