"""Reach: the best that the GPUs of a request can do, figure by figure. PURE."""

import math
from dataclasses import dataclass

from builders.plan.evaluate import Evaluation, Obstacle, planned_rate
from builders.plan.goal import Goal
from builders.plan.load import SteadyState
from builders.plan.request import PlanRequest


@dataclass(frozen=True)
class Reach:
    """The smallest limits that could be met, and the highest rate; inf or 0: none.

    Attributes:
        ttft_ms, tpot_ms: With the other limit as it is, if that can be met at all.
        both: TTFT and TPOT of the layout that comes nearest to both limits.
        rate_per_s: Within the limits.
    """

    ttft_ms: float
    tpot_ms: float
    both: tuple[float, float]
    rate_per_s: float

    @property
    def carries_the_rate(self) -> bool:
        """Whether all GPUs together carry the rate, whatever the limits."""
        return math.isfinite(self.both[0])


def reach(request: PlanRequest, judged: list[Evaluation], *, alone: bool = False) -> Reach:
    """Find the best of each figure.

    Args:
        request: What was asked.
        judged: All its candidates.
        alone: Of one request alone, not of the goal's rate on all GPUs.
    """
    goal = request.goal
    ttft_limit, tpot_limit = goal.ttft_ms or math.inf, goal.tpot_ms or math.inf
    times = [
        (state.ttft_s * 1e3, state.tpot_s * 1e3)
        for evaluation in judged
        if evaluation.obstacle not in (Obstacle.WEIGHTS, Obstacle.CONTEXT)
        and (state := evaluation.load.idle if alone else _at_all_gpus(goal, evaluation)) is not None
    ]
    excess = [(max(ttft / ttft_limit, tpot / tpot_limit), ttft, tpot) for ttft, tpot in times]
    return Reach(
        ttft_ms=_least([ttft for ttft, tpot in times if tpot <= tpot_limit] or [ttft for ttft, _ in times]),
        tpot_ms=_least([tpot for ttft, tpot in times if ttft <= ttft_limit] or [tpot for _, tpot in times]),
        both=min(excess)[1:] if excess else (math.inf, math.inf),
        rate_per_s=max((_rate_of_all_gpus(goal, evaluation) for evaluation in judged), default=0.0),
    )


def _least(values: list[float]) -> float:
    return min(values, default=math.inf)


def _replicas(goal: Goal, evaluation: Evaluation) -> float:
    return math.inf if goal.max_gpus is None else goal.max_gpus // evaluation.candidate.split.world_size


def _at_all_gpus(goal: Goal, evaluation: Evaluation) -> SteadyState | None:
    """Return the state of each replica if all GPUs are used; None: they cannot carry the rate."""
    replicas = _replicas(goal, evaluation)
    if not replicas:
        return None
    share = 0.0 if goal.rate_per_s is None else goal.rate_per_s / replicas
    most = evaluation.load.most(None, None)
    return None if most is None or planned_rate(most, goal) < share else evaluation.load.at(share)


def _rate_of_all_gpus(goal: Goal, evaluation: Evaluation) -> float:
    replicas = _replicas(goal, evaluation)
    return 0.0 if evaluation.most is None or math.isinf(replicas) else planned_rate(evaluation.most, goal) * replicas
