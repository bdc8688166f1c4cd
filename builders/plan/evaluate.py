"""Evaluation: what a candidate comes to, or why it cannot do what the goal asks. PURE."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from builders.plan.candidates import Candidate
from builders.plan.goal import Goal, Objective
from builders.plan.load import Load, SteadyState
from builders.plan.memory import longest_sequence
from builders.plan.request import PlanRequest
from builders.plan.sizes import Sizes, choose_sizes, shrink
from serve.engines.simulated.roofline import EFFICIENCIES, RooflineLatency

_MOST_REPLICAS = 100_000
_FEWEST_PLACES = 8  # in the batch, besides those that the mean load and its fluctuation take


class Obstacle(StrEnum):
    """Why a candidate cannot do it; the later, the nearer it is."""

    WEIGHTS = "weights"  # they do not fit
    CONTEXT = "context"  # the longest sequence does not
    TTFT = "ttft"  # not even one request alone is fast enough
    TPOT = "tpot"
    LOAD = "load"  # one request alone is, but there is no room for a batch
    GPUS = "gpus"  # it takes more than there are


@dataclass(frozen=True)
class Evaluation:
    """A candidate, judged.

    Attributes:
        candidate: What was judged.
        sizes: Of its engine.
        longest: Tokens of the longest sequence that fits.
        load: The goal's requests on one engine.
        obstacle: Why not; None: it can.
        state: Of each replica under its share of the load; None: there is none.
        most: The highest load of a replica within the limits; None: there is none.
        replicas: How many the rate takes.
    """

    candidate: Candidate
    sizes: Sizes
    longest: int
    load: Load
    obstacle: Obstacle | None = None
    state: SteadyState | None = None
    most: SteadyState | None = None
    replicas: int = 1

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.candidate.split.world_size

    @property
    def dollars_per_hour(self) -> float | None:
        """Of all GPUs; None: the price is not known."""
        price = self.candidate.offer.dollars_per_hour
        return None if price is None else price * self.gpus


def planned_rate(most: SteadyState, goal: Goal) -> float:
    """Return the requests a second that a replica is planned with, of the most that it can carry."""
    return most.rate_per_s * (1.0 - goal.headroom)


def latency_of(request: PlanRequest, candidate: Candidate) -> RooflineLatency:
    """Return the latency model of a candidate's engine."""
    gpu = candidate.offer.gpu
    efficiency = EFFICIENCIES[gpu.generation]
    return RooflineLatency(request.model.shape, gpu, candidate.split, candidate.precisions, efficiency)


def evaluate(request: PlanRequest, candidate: Candidate) -> Evaluation:
    """Judge a candidate."""
    shape, goal = request.model.shape, request.goal
    latency = latency_of(request, candidate)
    sizes = choose_sizes(shape, candidate, goal, latency)
    load = Load(latency, goal, sizes.limits)
    evaluation = Evaluation(candidate, sizes, longest_sequence(shape, candidate, sizes.memory), load)
    obstacle = _static_obstacle(request, evaluation)
    if obstacle is not None:
        return replace(evaluation, obstacle=obstacle)
    most = _most(request, load)
    if most is None:
        return replace(evaluation, obstacle=_load_obstacle(request, load))
    return _with_replicas(request, evaluation, most)


def _static_obstacle(request: PlanRequest, evaluation: Evaluation) -> Obstacle | None:
    goal = request.goal
    if evaluation.sizes.memory.kv_cache <= 0:
        return Obstacle.WEIGHTS
    needed = max(goal.context_tokens or 0, goal.sequence_tokens)
    return Obstacle.CONTEXT if evaluation.longest < needed else None


def _most(request: PlanRequest, load: Load) -> SteadyState | None:
    """Return the highest load that a replica may have."""
    goal = request.goal
    ttft_s = None if goal.ttft_ms is None else goal.ttft_ms * 1e-3
    tpot_s = None if goal.tpot_ms is None else goal.tpot_ms * 1e-3
    offline = ttft_s is None and tpot_s is None and goal.rate_per_s is None
    if offline and request.objective is Objective.MAX_TOKENS_PER_GPU_HOUR:
        return load.saturated if load.largest_batch >= 1.0 else None
    return load.most(ttft_s, tpot_s)


def _load_obstacle(request: PlanRequest, load: Load) -> Obstacle:
    goal, idle = request.goal, load.idle
    if load.largest_batch < 1.0:
        return Obstacle.CONTEXT
    if goal.ttft_ms is not None and idle.ttft_s * 1e3 > goal.ttft_ms:
        return Obstacle.TTFT
    if goal.tpot_ms is not None and idle.tpot_s * 1e3 > goal.tpot_ms:
        return Obstacle.TPOT
    return Obstacle.LOAD


def _with_replicas(request: PlanRequest, evaluation: Evaluation, most: SteadyState) -> Evaluation:
    goal, candidate = request.goal, evaluation.candidate
    replicas, state = 1, most
    if goal.rate_per_s is not None:
        if planned_rate(most, goal) * _MOST_REPLICAS < goal.rate_per_s:
            return replace(evaluation, obstacle=Obstacle.LOAD, most=most)
        replicas = math.ceil(goal.rate_per_s / planned_rate(most, goal) * (1.0 - 1e-9))
        state = evaluation.load.at(goal.rate_per_s / replicas)
    elif request.objective is Objective.LOWEST_LATENCY:
        state = evaluation.load.idle
    too_many = goal.max_gpus is not None and replicas * candidate.split.world_size > goal.max_gpus
    # Room for the fluctuation of the batch, and for a quarter more, as loads are never quite what was said.
    peak = most if goal.rate_per_s is None else state
    sequences = _FEWEST_PLACES + 1.25 * (peak.batch + 3.0 * peak.batch_deviation)
    sizes = shrink(evaluation.sizes, request.model.shape, candidate, goal, sequences)
    return replace(
        evaluation,
        obstacle=Obstacle.GPUS if too_many else None,
        state=state,
        most=most,
        replicas=replicas,
        sizes=sizes,
    )
