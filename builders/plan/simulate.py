"""simulate_plan: a candidate under random arrivals, in the discrete-event simulator, with the routing of production."""

import math
from dataclasses import dataclass

import numpy as np

from builders.plan.evaluate import Evaluation
from builders.plan.goal import Goal
from builders.plan.memory import TOKENS_PER_BLOCK
from builders.plan.request import PlanRequest
from serve.engines.simulated.settings import RooflineSettings, SimulatedSettings
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.policies import parse_candidate
from sim.simulator import simulate
from sim.workload_synthetic import Arrivals, Shared, Stream, SyntheticWorkload, TokenCounts, synthesise

_REQUESTS = 2000  # of which the first fifth only fills the batch
_WARM_UP = 0.2


@dataclass(frozen=True)
class Simulated:
    """What a simulation found; times in s.

    Attributes:
        requests: How many were counted.
        ttft_s, tpot_s: At the goal's percentile.
        ttft_mean_s, tpot_mean_s: Means.
        met: Share of requests that met both limits.
    """

    requests: int
    ttft_s: float
    tpot_s: float
    ttft_mean_s: float
    tpot_mean_s: float
    met: float


def simulate_plan(
    request: PlanRequest, evaluation: Evaluation, *, requests: int = _REQUESTS, seed: int = 0
) -> Simulated:
    """Simulate a candidate under the goal's rate, or under what its replica is planned to carry."""
    goal = request.goal
    assert evaluation.state is not None
    rate = evaluation.state.rate_per_s * evaluation.replicas
    workload = synthesise(describe_workload(goal, rate, requests, seed), TOKENS_PER_BLOCK)
    engine = engine_settings(request, evaluation)
    options = SimOptions(max_tokens=max(item.output_tokens for item in workload.requests), seed=seed)
    outcome = simulate(workload.requests, [engine] * evaluation.replicas, parse_candidate("predictive").make(), options)
    return _summarize(outcome, goal)


def describe_workload(goal: Goal, rate_per_s: float, requests: int, seed: int) -> SyntheticWorkload:
    """Return the goal's requests as a workload: what is cached is a prompt that all have in common."""
    cached = goal.input_tokens - goal.computed_tokens
    common = Shared(count=1, tokens=TokenCounts(mean=cached, deviation=0)) if cached else None
    return SyntheticWorkload(
        name="plan",
        seed=seed,
        duration_s=requests / rate_per_s,
        streams=(
            Stream(
                arrivals=Arrivals(per_s=rate_per_s),
                system_prompts=common,
                message_tokens=TokenCounts(mean=goal.computed_tokens, deviation=goal.length_deviation),
                output_tokens=TokenCounts(mean=goal.output_tokens, deviation=goal.length_deviation),
                sessions=False,
            ),
        ),
    )


def engine_settings(request: PlanRequest, evaluation: Evaluation) -> SimulatedSettings:
    """Return the simulated engine of a replica."""
    candidate, sizes = evaluation.candidate, evaluation.sizes
    split, precisions = candidate.split, candidate.precisions
    blocks = math.ceil(request.goal.sequence_tokens / TOKENS_PER_BLOCK)
    # In blocks of sequences of mean length: windows hold less of each.
    total_blocks = max(sizes.memory.kv_tokens // TOKENS_PER_BLOCK, sizes.memory.sequences * blocks)
    return SimulatedSettings(
        context_tokens=max(request.model.shape.context_tokens, request.goal.sequence_tokens),
        tokens_per_block=TOKENS_PER_BLOCK,
        total_blocks=total_blocks,
        scheduling="max_utilization",
        max_batch_size=max(1, sizes.limits.sequences),
        max_num_tokens=sizes.limits.step_tokens,
        latency=RooflineSettings.model_construct(
            model=request.model.shape,
            gpu=candidate.offer.gpu,
            tensor_parallel=split.tensor,
            pipeline_parallel=split.pipeline,
            expert_parallel=split.expert,
            attention_dp=split.attention_dp,
            weights=precisions.weights,
            attention_weights=precisions.attention,
            kv_cache=precisions.kv_cache,
        ),
    )


def _summarize(outcome: Outcome, goal: Goal) -> Simulated:
    first = int(len(outcome.arrival_s) * _WARM_UP)
    ttft, tpot = outcome.ttft_s[first:], outcome.tpot_s[first:]
    limits = [(ttft, goal.ttft_ms), (tpot, goal.tpot_ms)]
    met = np.logical_and.reduce(
        [~(times > (limit or math.inf) * 1e-3) & outcome.served[first:] for times, limit in limits]
    )
    return Simulated(
        requests=len(ttft),
        ttft_s=float(np.nanpercentile(ttft, goal.percentile)),
        tpot_s=float(np.nanpercentile(tpot, goal.percentile)),
        ttft_mean_s=float(np.nanmean(ttft)),
        tpot_mean_s=float(np.nanmean(tpot)),
        met=float(met.mean()),
    )
