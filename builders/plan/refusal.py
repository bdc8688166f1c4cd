"""refuse: why no candidate can do what the goal asks, and what would make it possible. PURE.

Every remedy was tried: the request that it leads to has a plan.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import ValidationError

from builders.plan.candidates import candidates
from builders.plan.evaluate import Evaluation, Obstacle, evaluate
from builders.plan.goal import Goal
from builders.plan.load import SteadyState
from builders.plan.request import Offer, PlanRequest
from serve.engines.simulated.hardware import GPUS

_GB = 1e9
_OTHER_GPUS = 3


@dataclass(frozen=True)
class Remedy:
    """What would make it possible.

    Attributes:
        text: For people, with the flag that does it.
        request: The request that it leads to.
    """

    text: str
    request: PlanRequest


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


def is_feasible(request: PlanRequest) -> bool:
    """Say whether some candidate can do it."""
    return any(evaluate(request, candidate).obstacle is None for candidate in candidates(request))


def refuse(request: PlanRequest) -> Refusal:
    """Explain a request that no candidate can fulfil."""
    judged = [evaluate(request, candidate) for candidate in candidates(request)]
    remedies = tuple(remedy for remedy in _remedies(request, judged) if remedy is not None)
    return Refusal(request, tuple(_reasons(request, judged)), remedies)


# Reasons


def _reasons(request: PlanRequest, judged: list[Evaluation]) -> Iterator[str]:
    goal, shape = request.goal, request.model.shape
    if goal.sequence_tokens > shape.context_tokens or (goal.context_tokens or 0) > shape.context_tokens:
        asked = max(goal.sequence_tokens, goal.context_tokens or 0)
        yield f"context: {request.model.name} holds {shape.context_tokens:,} tokens, and {asked:,} are asked for"
        return
    if not judged:
        names = ", ".join(offer.gpu.name for offer in request.offers)
        yield f"quantization: none that is allowed can be computed on {names}, and loaded from a {request.kind}"
        return
    present = {evaluation.obstacle for evaluation in judged}
    if present <= {Obstacle.WEIGHTS, Obstacle.CONTEXT}:
        yield from _memory_reasons(request, judged)
        return
    fast = fastest(request, judged)
    if goal.ttft_ms is not None and math.inf > fast.ttft_ms > goal.ttft_ms:
        yield f"TTFT: at best {fast.ttft_ms:.0f} ms on {_gpus(goal)}, and the limit is {goal.ttft_ms:g} ms"
    if goal.tpot_ms is not None and math.inf > fast.tpot_ms > goal.tpot_ms:
        yield f"TPOT: at best {fast.tpot_ms:.1f} ms on {_gpus(goal)}, and the limit is {goal.tpot_ms:g} ms"
    needed = [evaluation.gpus for evaluation in judged if evaluation.obstacle is Obstacle.GPUS]
    if needed:
        load = f"{goal.rate_per_s:g} requests/s within the limits"
        yield f"GPUs: {load} take {min(needed)}, and there are {goal.max_gpus}"
    elif Obstacle.LOAD in present:
        yield "load: one request alone is fast enough, but no layout holds a batch within the limits"


def _memory_reasons(request: PlanRequest, judged: list[Evaluation]) -> Iterator[str]:
    nearest = max(judged, key=lambda evaluation: evaluation.sizes.memory.free)
    memory, split = nearest.sizes.memory, nearest.candidate.split
    place = f"{split.world_size} x {nearest.candidate.offer.gpu.name}"
    if nearest.obstacle is Obstacle.WEIGHTS:
        weights = memory.weights.total * split.world_size / _GB
        yield (
            f"memory: on {place}, weights of {weights:.1f} GB ({memory.weights.total / _GB:.1f} GB each) and "
            f"{(memory.total - memory.free - memory.weights.total) / _GB:.1f} GB of the runtime leave nothing of "
            f"{memory.total / _GB:.1f} GB for keys and values"
        )
        return
    longest = max(evaluation.sizes.memory.longest for evaluation in judged)
    asked = max(request.goal.sequence_tokens, request.goal.context_tokens or 0)
    yield f"context: the longest sequence that fits beside the weights on {place} has {longest:,} of {asked:,} tokens"


def _gpus(goal: Goal) -> str:
    return "any number of GPUs" if goal.max_gpus is None else f"{goal.max_gpus} GPUs"


# What is the best that there is


@dataclass(frozen=True)
class Fastest:
    """The smallest values that each bound could have, the others being as they are; inf: there is none."""

    ttft_ms: float
    tpot_ms: float
    both: tuple[float, float]
    rate_per_s: float


def fastest(request: PlanRequest, judged: list[Evaluation]) -> Fastest:
    """Find the best of each figure that the GPUs can reach."""
    goal = request.goal
    found = [
        (evaluation, state)
        for evaluation in judged
        if evaluation.obstacle not in (Obstacle.WEIGHTS, Obstacle.CONTEXT)
        and (state := _at_all_gpus(request, evaluation)) is not None
    ]
    ttft_limit = math.inf if goal.ttft_ms is None else goal.ttft_ms
    tpot_limit = math.inf if goal.tpot_ms is None else goal.tpot_ms
    ttft = [s.ttft_s * 1e3 for _, s in found if s.tpot_s * 1e3 <= tpot_limit]
    tpot = [s.tpot_s * 1e3 for _, s in found if s.ttft_s * 1e3 <= ttft_limit]
    either = [(s.ttft_s * 1e3, s.tpot_s * 1e3) for _, s in found]
    excess = [(max(t / ttft_limit, p / tpot_limit), t, p) for t, p in either]
    rates = [_rate_at_all_gpus(request, evaluation) for evaluation in judged]
    least = min(excess)[1:] if excess else (math.inf, math.inf)
    return Fastest(
        ttft_ms=min(ttft, default=min((t for t, _ in either), default=math.inf)),
        tpot_ms=min(tpot, default=min((p for _, p in either), default=math.inf)),
        both=(least[0], least[1]),
        rate_per_s=max(rates, default=0.0),
    )


def _replicas(goal: Goal, evaluation: Evaluation) -> float:
    return math.inf if goal.max_gpus is None else goal.max_gpus // evaluation.candidate.split.world_size


def _at_all_gpus(request: PlanRequest, evaluation: Evaluation) -> SteadyState | None:
    """Return the state of each replica if all GPUs are used; None: they cannot carry the rate."""
    goal, load = request.goal, evaluation.load
    replicas = _replicas(goal, evaluation)
    if not replicas:
        return None
    share = 0.0 if goal.rate_per_s is None else goal.rate_per_s / replicas
    most = load.most(None, None)
    return None if most is None or most.rate_per_s < share else load.at(share)


def _rate_at_all_gpus(request: PlanRequest, evaluation: Evaluation) -> float:
    replicas = _replicas(request.goal, evaluation)
    return 0.0 if evaluation.most is None or math.isinf(replicas) else evaluation.most.rate_per_s * replicas


# Remedies


def _remedies(request: PlanRequest, judged: list[Evaluation]) -> Iterator[Remedy | None]:
    yield _more_gpus(request)
    yield _any_quantization(request)
    fast = fastest(request, judged)
    goal = request.goal
    ttft = None if goal.ttft_ms is None else _relaxed(request, ttft_ms=fast.ttft_ms)
    tpot = None if goal.tpot_ms is None else _relaxed(request, tpot_ms=fast.tpot_ms)
    yield ttft
    yield tpot
    if ttft is None and tpot is None and goal.ttft_ms is not None and goal.tpot_ms is not None:
        yield _relaxed(request, ttft_ms=fast.both[0], tpot_ms=fast.both[1])
    yield _lower_rate(request, fast.rate_per_s)
    yield _shorter(request, judged)
    yield from _other_gpus(request)


def _more_gpus(request: PlanRequest) -> Remedy | None:
    if request.goal.max_gpus is None:
        return None
    unbounded = _changed(request, max_gpus=None)
    needed = [e.gpus for e in (evaluate(unbounded, c) for c in candidates(unbounded)) if e.obstacle is None]
    if not needed:
        return None
    enough = _changed(request, max_gpus=min(needed))
    return Remedy(f"use {min(needed)} GPUs: --gpus {min(needed)}", enough) if is_feasible(enough) else None


def _any_quantization(request: PlanRequest) -> Remedy | None:
    if request.recipes is None:
        return None
    free = replace(request, recipes=None)
    good = [e for e in (evaluate(free, candidate) for candidate in candidates(free)) if e.obstacle is None]
    if not good:
        return None
    recipe = min(good, key=lambda evaluation: evaluation.candidate.lossiness).candidate.recipe
    return Remedy(f"allow another precision: --quantize {recipe}", replace(request, recipes=(recipe,)))


def _relaxed(request: PlanRequest, **limits: float) -> Remedy | None:
    """Raise limits to what can be reached, rounded up to two digits; a little more if that changes the sizes."""
    for factor in (1.0, 1.1, 1.25, 1.5):
        if any(math.isinf(limit) for limit in limits.values()):
            return None
        raised = {name: _round_up(limit * factor) for name, limit in limits.items()}
        changed = _changed(request, **raised)
        if is_feasible(changed):
            asked = " and ".join(
                f"{name.removesuffix('_ms').upper()} of {value:g} ms" for name, value in raised.items()
            )
            flags = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in raised.items())
            return Remedy(f"accept a {asked}: {flags}", changed)
    return None


def _lower_rate(request: PlanRequest, rate_per_s: float) -> Remedy | None:
    if request.goal.rate_per_s is None or not 0.0 < rate_per_s < request.goal.rate_per_s:
        return None
    for factor in (1.0, 0.97, 0.9):
        rate = _round_down(rate_per_s * factor)
        changed = _changed(request, rate_per_s=rate)
        if is_feasible(changed):
            return Remedy(f"ask for {rate:g} requests/s: --rate {rate:g}", changed)
    return None


def _shorter(request: PlanRequest, judged: list[Evaluation]) -> Remedy | None:
    """Shorten the longest sequence, then all of them, to what the model and the memory hold."""
    goal = request.goal
    longest = max((evaluation.sizes.memory.longest for evaluation in judged), default=0)
    longest = min(longest, request.model.shape.context_tokens)
    if goal.context_tokens is not None and goal.sequence_tokens <= longest < goal.context_tokens:
        changed = _changed(request, context_tokens=longest)
        if is_feasible(changed):
            return Remedy(f"allow shorter sequences: --context-tokens {longest}", changed)
    if longest >= goal.sequence_tokens:
        return None
    for share in (1.0, 0.5, 0.25):
        tokens = int(longest * share) - goal.output_tokens
        if tokens >= 1:
            changed = _changed(request, input_tokens=tokens, context_tokens=None)
            if is_feasible(changed):
                return Remedy(f"send shorter prompts: --input-tokens {tokens}", changed)
    return None


def _other_gpus(request: PlanRequest) -> Iterator[Remedy]:
    """Look for GPUs with more memory or bandwidth, the smallest first."""
    offers = {offer.key for offer in request.offers}
    if any(offer.gpu.generation == "cpu" for offer in request.offers):
        return
    weakest = min(offer.gpu.memory_gb_per_s for offer in request.offers)
    least = min(offer.gpu.memory_bytes for offer in request.offers)
    better = [
        (gpu.memory_gb_per_s, key)
        for key, gpu in GPUS.items()
        if key not in offers and (gpu.memory_gb_per_s > weakest or gpu.memory_bytes > least)
    ]
    found = 0
    for _, key in sorted(better):
        changed = replace(request, offers=(Offer(key, GPUS[key], None, GPUS[key].node_gpus),))
        if is_feasible(changed):
            yield Remedy(f"use another GPU: --gpu {key}", changed)
            found += 1
        if found == _OTHER_GPUS:
            return


def _changed(request: PlanRequest, **changes: float | int | None) -> PlanRequest:
    try:
        return replace(request, goal=request.goal.changed(**changes))
    except ValidationError:  # a value that no goal may have is no remedy
        return request


def _round_up(value: float) -> float:
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit * (1 - 1e-9)) * unit, 6)


def _round_down(value: float) -> float:
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.floor(value / unit * (1 + 1e-9)) * unit, 9)
