"""Replay a trace through simulated replicas in virtual time, with the routing code of the service."""

import argparse
import sys
from collections.abc import Sequence

from serve.core.routing.settings import RoutingSettings
from serve.errors import ConfigError
from serve.yaml_file import read_settings
from sim.arguments import add_arguments, overrides, positive_counts
from sim.deployment import SimDeployment, make_deployment, read_deployment
from sim.measured import measured
from sim.metrics import Summary, summarize
from sim.options import SimOptions
from sim.plot import write_plot
from sim.policies import Candidate, configured_candidate, parse_candidate, parse_candidates
from sim.progress import terminal_progress
from sim.recommend import predictive_grid, recommend
from sim.report import Report
from sim.slo import Slo
from sim.study import Case, Result, run_study
from sim.workload import Workload
from sim.workload_file import read_workload


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="raytrt simulate", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ConfigError as exc:
        print(f"raytrt simulate: {exc}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say, which `add_arguments` has declared; returns the exit status.

    Raises:
        ConfigError: Something is wrong with them, or with a file.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("raytrt simulate: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    slo = _slo(arguments)
    workload, deployment = _workload_and_deployment(arguments)
    configured = None if deployment.routing is None else configured_candidate(deployment.routing)
    candidates = _candidates(arguments, configured, workload)
    counts = positive_counts("--replicas", arguments.replicas) if arguments.replicas else [deployment.replicas or 1]
    for note in deployment.notes:
        print(f"raytrt simulate: note: {note}", file=sys.stderr)
    results = _simulate(arguments, workload, deployment, [Case(c, count) for count in counts for c in candidates])
    summaries = [_summarize(result, slo, deployment, arguments) for result in results]
    advice = []
    if arguments.recommend:
        groups = [[result for result in results if result.case.replicas == count] for count in counts]
        in_use = None if configured is None else configured.label
        advice = [recommend(group, slo, in_use, arguments.seed) for group in groups]
    report = Report(workload, deployment, slo, tuple(summaries), measured(workload.requests), tuple(advice))
    print(report.json() if arguments.json else report.text())
    if arguments.plot is not None:
        write_plot(arguments.plot, results, summaries, report.title)
    return 0


def _slo(arguments: argparse.Namespace) -> Slo:
    slo = Slo() if arguments.slo is None else read_settings(Slo, arguments.slo)
    limits = {"ttft_ms": arguments.ttft_ms, "tpot_ms": arguments.tpot_ms}
    return slo.model_copy(update={name: limit for name, limit in limits.items() if limit is not None})


def _workload_and_deployment(arguments: argparse.Namespace) -> tuple[Workload, SimDeployment]:
    deployment = _deployment(arguments, None)
    workload = read_workload(
        arguments.trace,
        arguments.format,
        tokens_per_block=arguments.tokens_per_block,
        default_block=deployment.engine.tokens_per_block,
        limit=arguments.limit,
        model=arguments.log_model,
    )
    return workload.faster(arguments.rate), _deployment(arguments, workload.tokens_per_block)


def _deployment(arguments: argparse.Namespace, tokens_per_block: int | None) -> SimDeployment:
    changes = overrides(arguments, tokens_per_block)
    if arguments.config is None:
        return make_deployment(changes)
    return read_deployment(arguments.config, arguments.config_model, changes)


def _candidates(arguments: argparse.Namespace, configured: Candidate | None, workload: Workload) -> list[Candidate]:
    """Return the policies to simulate, the configured one first."""
    first = [] if configured is None else [configured]
    if arguments.policy is not None:
        others = parse_candidates(arguments.policy)
        first = first if arguments.recommend else []
    elif arguments.recommend:
        others = [*parse_candidates("all"), *predictive_grid(parse_candidate("predictive"))]
        useless = set() if any(request.session for request in workload.requests) else {"session_affinity"}
        useless |= set() if any(request.lora for request in workload.requests) else {"lora_affinity"}
        others = [candidate for candidate in others if candidate.label not in useless]
    else:
        others = parse_candidates("predictive,round_robin")
    if configured is not None:
        others = [candidate.beside(configured.settings) for candidate in others]
    by_label = {candidate.label: candidate for candidate in [*others, *first]}
    return [by_label[label] for label in dict.fromkeys(candidate.label for candidate in [*first, *others])]


def _simulate(
    arguments: argparse.Namespace, workload: Workload, deployment: SimDeployment, cases: list[Case]
) -> list[Result]:
    routing = deployment.routing or RoutingSettings()
    options = SimOptions(
        gateways=arguments.gateways or deployment.gateways,
        delay_s=arguments.delay_ms * 1e-3,
        load_interval_s=arguments.load_interval_ms * 1e-3,
        max_tokens=arguments.max_tokens,
        max_index_blocks=routing.max_index_blocks,
        fairness=routing.fairness.model_copy(update={"enabled": False}) if arguments.no_queue else routing.fairness,
        seed=arguments.seed,
    )
    progress = terminal_progress()
    try:
        return run_study(workload.requests, deployment.engine, cases, options, jobs=arguments.jobs, progress=progress)
    finally:
        progress.close()


def _summarize(result: Result, slo: Slo, deployment: SimDeployment, arguments: argparse.Namespace) -> Summary:
    return summarize(
        result.outcome,
        result.case.candidate.label,
        slo,
        gpus_per_replica=deployment.gpus_per_replica,
        gpu_dollars_per_hour=arguments.gpu_dollars_per_hour,
        wall_s=result.wall_s,
    )


if __name__ == "__main__":
    sys.exit(main())
