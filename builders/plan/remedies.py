"""remedies: what would make a request possible. PURE. Each was tried: the request that it leads to has a plan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import ValidationError

from builders.plan.candidates import candidates
from builders.plan.evaluate import Evaluation, evaluate
from builders.plan.goal import Goal
from builders.plan.reach import Reach, reach
from builders.plan.request import Offer, PlanRequest
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.hardware import GPUS

_OTHER_GPUS = 3
# A limit at the very edge would leave each engine one request at a time.
_ROOM = 2.0
_FLAGS = {"max_gpus": "gpus", "rate_per_s": "rate"}


@dataclass(frozen=True)
class Remedy:
    """What would make it possible.

    Attributes:
        text: For people, with the flags that do it.
        request: The request that it leads to.
    """

    text: str
    request: PlanRequest


def is_feasible(request: PlanRequest) -> bool:
    """Say whether some candidate can do it."""
    return any(evaluate(request, candidate).obstacle is None for candidate in candidates(request))


def remedies(request: PlanRequest, judged: list[Evaluation]) -> list[Remedy]:
    """Return what would make a request possible, each enough by itself; `judged`: all its candidates."""
    at_rate = reach(request, judged)
    single = [_more_gpus(request), _any_quantization(request), *_relaxed_limits(request, at_rate)]
    single += [_lower_rate(request, at_rate.rate_per_s), _no_headroom(request), _shorter(request, judged)]
    found = [remedy for remedy in single if remedy is not None]
    if not found:
        found = list(_combined(request))
    return [*found, *_other_gpus(request)]


def _more_gpus(request: PlanRequest) -> Remedy | None:
    if request.goal.max_gpus is None:
        return None
    needed = _fewest_gpus(_changed(request, max_gpus=None))
    return None if needed is None else _remedy(request, f"use {needed} GPUs", max_gpus=needed)


def _fewest_gpus(request: PlanRequest) -> int | None:
    judged = (evaluate(request, candidate) for candidate in candidates(request))
    return min((evaluation.gpus for evaluation in judged if evaluation.obstacle is None), default=None)


def _any_quantization(request: PlanRequest) -> Remedy | None:
    if request.recipes is None:
        return None
    free = replace(request, recipes=None)
    judged = (evaluate(free, candidate) for candidate in candidates(free))
    good = [evaluation.candidate for evaluation in judged if evaluation.obstacle is None]
    if not good:
        return None
    recipe = min(good, key=lambda candidate: candidate.lossiness).recipe
    return Remedy(f"allow another precision: --quantize {recipe}", replace(request, recipes=(recipe,)))


def _relaxed_limits(request: PlanRequest, found: Reach) -> Iterator[Remedy | None]:
    """Raise one limit to what can be reached, or both."""
    goal = request.goal
    ttft = None if goal.ttft_ms is None else _relaxed(request, ttft_ms=found.ttft_ms)
    tpot = None if goal.tpot_ms is None else _relaxed(request, tpot_ms=found.tpot_ms)
    yield from (ttft, tpot)
    if ttft is None and tpot is None and goal.ttft_ms is not None and goal.tpot_ms is not None:
        yield _relaxed(request, ttft_ms=max(found.both[0], goal.ttft_ms), tpot_ms=max(found.both[1], goal.tpot_ms))


def _relaxed(request: PlanRequest, **limits: float) -> Remedy | None:
    """Raise limits, rounded up to two digits; and a little more if that changes the sizes of a step."""
    if not all(map(math.isfinite, limits.values())):
        return None
    for factor in (1.0, 1.1, 1.25, 1.5):
        raised = {name: _round_up(limit * factor) for name, limit in limits.items()}
        if remedy := _remedy(request, f"accept {_limits(raised)}", **raised):
            return remedy
    return None


def _lower_rate(request: PlanRequest, rate_per_s: float) -> Remedy | None:
    if request.goal.rate_per_s is None or not 0.0 < rate_per_s < request.goal.rate_per_s:
        return None
    for factor in (1.0, 0.97, 0.9):
        rate = _round_down(rate_per_s * factor)
        if remedy := _remedy(request, f"ask for {rate:g} requests/s", rate_per_s=rate):
            return remedy
    return None


def _no_headroom(request: PlanRequest) -> Remedy | None:
    return _remedy(request, "keep nothing of a replica free", headroom=0.0) if request.goal.headroom else None


def _shorter(request: PlanRequest, judged: list[Evaluation]) -> Remedy | None:
    """Shorten the longest sequence, then all of them, to what the model and the memory hold."""
    goal = request.goal
    longest = max((evaluation.longest for evaluation in judged), default=0)
    if goal.context_tokens is not None and goal.sequence_tokens <= longest < goal.context_tokens:
        return _remedy(request, "allow shorter sequences", context_tokens=longest)
    if longest >= goal.sequence_tokens:
        return None
    for share in (1.0, 0.5, 0.25):
        tokens = int(longest * share) - goal.output_tokens
        if tokens >= 1 and (remedy := _remedy(request, "send shorter prompts", input_tokens=tokens)):
            return remedy
    return None


def _combined(request: PlanRequest) -> Iterator[Remedy]:
    """Raise the limits above what one request alone takes, and use more GPUs, or ask for fewer requests."""
    unbounded = _changed(request, max_gpus=None)
    raised = _above_idle(unbounded)
    needed = _fewest_gpus(_changed(unbounded, **raised))
    if needed is not None and request.goal.max_gpus is not None:
        gpus = max(needed, request.goal.max_gpus)
        if remedy := _remedy(request, f"{_accept(raised)}use {gpus} GPUs", **raised, max_gpus=gpus):
            yield remedy
    raised = _above_idle(request)
    relaxed = _changed(request, **raised)
    judged = [evaluate(relaxed, candidate) for candidate in candidates(relaxed)]
    slower = _lower_rate(relaxed, reach(relaxed, judged).rate_per_s)
    if slower is not None and (rate := slower.request.goal.rate_per_s) is not None:
        text = f"{_accept(raised)}ask for {rate:g} requests/s"
        if remedy := _remedy(request, text, **raised, rate_per_s=rate):
            yield remedy


def _above_idle(request: PlanRequest) -> dict[str, float]:
    """Return limits that leave room for some load, in place of those that do not."""
    goal = request.goal
    alone = reach(request, [evaluate(request, candidate) for candidate in candidates(request)], alone=True)
    best = (("ttft_ms", alone.both[0], goal.ttft_ms), ("tpot_ms", alone.both[1], goal.tpot_ms))
    return {
        name: _round_up(least * _ROOM)
        for name, least, limit in best
        if limit is not None and math.isfinite(least) and least * _ROOM > limit
    }


def _accept(raised: dict[str, float]) -> str:
    return f"accept {_limits(raised)} and " if raised else ""


def _other_gpus(request: PlanRequest) -> Iterator[Remedy]:
    """Look for GPUs with more memory or bandwidth, the slowest first."""
    offers = {offer.key for offer in request.offers}
    if any(offer.gpu.generation == "cpu" for offer in request.offers):
        # As the command line would have it, if a GPU were named.
        request = replace(request, kind=BundleKind.TRTLLM_CHECKPOINT, goal=request.goal.changed(max_gpus=None))
    weakest = min(offer.gpu.memory_gb_per_s for offer in request.offers)
    least = min(offer.gpu.memory_bytes for offer in request.offers)
    better = sorted(
        (gpu.memory_gb_per_s, key)
        for key, gpu in GPUS.items()
        if key not in offers and (gpu.memory_gb_per_s > weakest or gpu.memory_bytes > least)
    )
    found = 0
    for _, key in better:
        changed = replace(request, offers=(Offer(key, GPUS[key], None, GPUS[key].node_gpus),))
        if found < _OTHER_GPUS and is_feasible(changed):
            yield Remedy(f"use another GPU: --gpu {key}", changed)
            found += 1


def _remedy(request: PlanRequest, text: str, **changes: float) -> Remedy | None:
    """Return a remedy, if it is one."""
    changed = _changed(request, **changes)
    if changed.goal == request.goal or not is_feasible(changed):
        return None
    flags = " ".join(f"--{_FLAGS.get(name, name).replace('_', '-')} {value:g}" for name, value in changes.items())
    return Remedy(f"{text}: {flags}", changed)


def _changed(request: PlanRequest, **changes: float | None) -> PlanRequest:
    try:
        goal: Goal = request.goal.changed(**changes)
    except ValidationError:  # a value that no goal may have is no remedy
        return request
    return replace(request, goal=goal)


def _limits(limits: dict[str, float]) -> str:
    return " and ".join(f"a {name.removesuffix('_ms').upper()} of {value:g} ms" for name, value in limits.items())


def _round_up(value: float) -> float:
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit * (1 - 1e-9)) * unit, 6)


def _round_down(value: float) -> float:
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.floor(value / unit * (1 + 1e-9)) * unit, 9)
