"""PURE: which concurrency a load test offers next.

Goodput rises with concurrency until requests miss their limits, and then falls. So the test climbs by a factor until
the goal is missed, or more streams bring no more; then it halves the gap between the last that met it and the first
that did not. Where already the first misses it, it descends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from builders.evaluate.load_point import Goal
from serve.artifacts.certificates import LoadPoint

_NO_GAIN = 1.02  # two percent more is no more
_STEPS_WITHOUT_GAIN = 2  # after which it is believed
_CLOSE = 1.5  # a gap that is not worth halving


@dataclass(frozen=True)
class Ladder:
    """How a load test climbs.

    Attributes:
        first: Concurrency that it begins with.
        most: Largest that is offered.
        factor: Between two steps.
        max_points: Tests at most.
    """

    first: int
    most: int
    factor: int = 2
    max_points: int = 6


def next_concurrency(points: Sequence[LoadPoint], ladder: Ladder, goal: Goal) -> int | None:
    """Return the next concurrency, never one twice; None: enough is known.

    Args:
        points: What was measured, in order.
        ladder: How to climb.
        goal: What requests have to meet.
    """
    if not points:
        return max(1, min(ladder.first, ladder.most))
    if len(points) >= ladder.max_points:
        return None
    following = _following(points, ladder, goal)
    return following if following not in {point.concurrency for point in points} else None


def _following(points: Sequence[LoadPoint], ladder: Ladder, goal: Goal) -> int | None:
    met = sorted(point.concurrency for point in points if goal.is_met(point))
    missed = sorted(point.concurrency for point in points if not goal.is_met(point))
    if not met:
        return max(1, missed[0] // ladder.factor)
    above = [concurrency for concurrency in missed if concurrency > met[-1]]
    if above:
        gap = above[0] / met[-1]
        return round(math.sqrt(above[0] * met[-1])) if gap > _CLOSE else None
    return None if _has_levelled_off(points, met) else min(ladder.most, met[-1] * ladder.factor)


def _has_levelled_off(points: Sequence[LoadPoint], met: Sequence[int]) -> bool:
    """Whether the last two steps brought nothing: one may be a hiccup, as when kernels are compiled for a new size."""
    goodput = {point.concurrency: point.goodput_tokens_per_s for point in points}
    if len(met) <= _STEPS_WITHOUT_GAIN:
        return False
    before = max(goodput[concurrency] for concurrency in met[:-_STEPS_WITHOUT_GAIN])
    return max(goodput[concurrency] for concurrency in met[-_STEPS_WITHOUT_GAIN:]) <= _NO_GAIN * before
