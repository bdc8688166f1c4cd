"""refuse: why no candidate can do what the goal asks, and what would make it possible. PURE."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from builders.plan.candidates import candidates
from builders.plan.evaluate import Evaluation, Obstacle, evaluate
from builders.plan.goal import Goal
from builders.plan.reach import reach
from builders.plan.remedies import Remedy, remedies
from builders.plan.request import PlanRequest

_GB = 1e9


@dataclass(frozen=True)
class Refusal:
    """Nothing can do it.

    Attributes:
        request: What was asked.
        reasons: Each bound that is violated, with the smallest value that is not.
        remedies: Each enough by itself.
    """

    request: PlanRequest
    reasons: tuple[str, ...]
    remedies: tuple[Remedy, ...]


def refuse(request: PlanRequest) -> Refusal:
    """Explain a request that no candidate can fulfil."""
    judged = [evaluate(request, candidate) for candidate in candidates(request)]
    return Refusal(request, tuple(_reasons(request, judged)), tuple(remedies(request, judged)))


def _reasons(request: PlanRequest, judged: list[Evaluation]) -> Iterator[str]:
    goal, shape = request.goal, request.model.shape
    asked = max(goal.sequence_tokens, goal.context_tokens or 0)
    if asked > shape.context_tokens:
        yield f"context: {request.model.name} holds {shape.context_tokens:,} tokens, and {asked:,} are asked for"
    elif not judged:
        names = ", ".join(offer.gpu.name for offer in request.offers)
        yield f"quantization: none that is allowed can be computed on {names}, and loaded from a {request.kind}"
    elif {evaluation.obstacle for evaluation in judged} <= {Obstacle.WEIGHTS, Obstacle.CONTEXT}:
        yield _memory_reason(request, judged, asked)
    else:
        yield from _load_reasons(request, judged)


def _memory_reason(request: PlanRequest, judged: list[Evaluation], asked: int) -> str:
    nearest = max(judged, key=lambda evaluation: evaluation.sizes.memory.free)
    memory, split = nearest.sizes.memory, nearest.candidate.split
    place = f"{split.world_size} x {nearest.candidate.offer.gpu.name}"
    if nearest.obstacle is Obstacle.WEIGHTS:
        other = memory.total - memory.free - memory.weights.total
        return (
            f"memory: on {place}, weights of {memory.weights.total * split.world_size / _GB:.1f} GB "
            f"({memory.weights.total / _GB:.1f} GB each) and {other / _GB:.1f} GB of the runtime leave nothing of "
            f"{memory.total / _GB:.1f} GB for keys and values"
        )
    longest = max(evaluation.longest for evaluation in judged)
    return f"context: the longest sequence that fits beside the weights on {place} has {longest:,} of {asked:,} tokens"


def _load_reasons(request: PlanRequest, judged: list[Evaluation]) -> Iterator[str]:
    goal, found = request.goal, reach(request, judged)
    best, where = found, f"on {_all_gpus(goal)}"
    if not found.carries_the_rate:
        spare = f", with {goal.headroom:.0%} of each replica kept free" if goal.headroom else ""
        yield f"load: {_all_gpus(goal)} cannot carry {goal.rate_per_s or 0:g} requests/s{spare}, whatever the limits"
        best, where = reach(request, judged, alone=True), "for one request alone"
    ttft, tpot = goal.ttft_ms or math.inf, goal.tpot_ms or math.inf
    if best.ttft_ms > ttft:
        yield f"TTFT: at best {best.ttft_ms:.0f} ms {where}, and the limit is {ttft:g} ms"
    if best.tpot_ms > tpot:
        yield f"TPOT: at best {best.tpot_ms:.1f} ms {where}, and the limit is {tpot:g} ms"
    needed = [evaluation.gpus for evaluation in judged if evaluation.obstacle is Obstacle.GPUS]
    if needed:
        load = f"{goal.rate_per_s:g} requests/s within the limits"
        yield f"GPUs: {load} take {min(needed)}, and there are {goal.max_gpus}"
    elif found.carries_the_rate and best.ttft_ms <= ttft and best.tpot_ms <= tpot:
        yield "load: no layout holds a batch within the limits"


def _all_gpus(goal: Goal) -> str:
    if goal.max_gpus is None:
        return "any number of GPUs"
    return f"{goal.max_gpus} GPU{'s' if goal.max_gpus > 1 else ''}"
