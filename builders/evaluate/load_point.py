"""PURE: the requests of one load test -> its figures.

The load is closed: so many streams, each of which sends its next request when the last one has ended. Tokens are
counted in a window that begins once all streams run; a stream's first request begins at a time of its own, as the
streams of real users do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from serve.artifacts.certificates import LoadPoint

_PARTS = 5  # of a test, whose differences show its noise


@dataclass(frozen=True)
class Goal:
    """What requests have to meet.

    Attributes:
        ttft_s, tpot_s: Limits of a request; both count.
        percentile: Of the requests that have to meet them, in percent.
    """

    ttft_s: float
    tpot_s: float
    percentile: float

    def is_met(self, point: LoadPoint) -> bool:
        """Whether enough requests met both limits."""
        return point.within_limits >= self.percentile / 100

    def nearness(self, point: LoadPoint) -> float:
        """Return how near a point came to the limits, in (0, 1]: the smaller share of limit over p95 of the two."""
        shares = (self.ttft_s / max(point.ttft_p95_s, 1e-9), self.tpot_s / max(point.tpot_p95_s, 1e-9))
        return min(1.0, *shares)


@dataclass(frozen=True)
class LoadTrace:
    """One request. Times are of one clock, in s.

    Attributes:
        started_s: When it was sent.
        token_times: When tokens came, and how many.
        ended_s: When the last one came, or when it was given up.
        finished: Whether it came to its end.
    """

    started_s: float
    token_times: tuple[tuple[float, int], ...]
    ended_s: float
    finished: bool

    @property
    def ttft_s(self) -> float:
        """Time to the first token; so far, if none has come."""
        return (self.token_times[0][0] if self.token_times else self.ended_s) - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each further token; None: there was one token, or none."""
        tokens = sum(count for _, count in self.token_times)
        return (self.ended_s - self.token_times[0][0]) / (tokens - 1) if tokens > 1 else None

    def meets(self, goal: Goal) -> bool:
        """Whether it was served well."""
        tpot_s = self.tpot_s
        return self.finished and self.ttft_s <= goal.ttft_s and (tpot_s is None or tpot_s <= goal.tpot_s)

    def tokens_within(self, begin_s: float, end_s: float) -> int:
        """Return how many tokens came in a window."""
        return sum(count for time_s, count in self.token_times if begin_s <= time_s < end_s)


def summarize(traces: Sequence[LoadTrace], begin_s: float, end_s: float, concurrency: int, goal: Goal) -> LoadPoint:
    """Return the figures of a test.

    Args:
        traces: All its requests, those that were given up included; at least one.
        begin_s: When all streams ran.
        end_s: When no more requests were sent.
        concurrency: Streams.
        goal: What requests have to meet.
    """
    seconds = end_s - begin_s
    judged = [trace for trace in traces if trace.started_s >= begin_s]
    if len(judged) < concurrency:  # a short test: the first requests have to count, too
        judged = list(traces)
    good = [trace for trace in traces if trace.meets(goal)]
    ttft_s = [trace.ttft_s for trace in judged]
    tpot_s = [told for trace in judged if (told := trace.tpot_s) is not None] or [0.0]
    return LoadPoint(
        concurrency=concurrency,
        requests=len(judged),
        seconds=seconds,
        output_tokens_per_s=sum(trace.tokens_within(begin_s, end_s) for trace in traces) / seconds,
        goodput_tokens_per_s=sum(trace.tokens_within(begin_s, end_s) for trace in good) / seconds,
        ttft_p50_s=float(np.percentile(ttft_s, 50)),
        ttft_p95_s=float(np.percentile(ttft_s, 95)),
        tpot_p50_s=float(np.percentile(tpot_s, 50)),
        tpot_p95_s=float(np.percentile(tpot_s, 95)),
        within_limits=sum(trace.meets(goal) for trace in judged) / len(judged),
        failed=sum(not trace.finished for trace in judged),
        relative_error=_relative_error(traces, begin_s, end_s),
    )


def best_point(points: Sequence[LoadPoint], goal: Goal) -> LoadPoint:
    """Return the point with most goodput of those that meet the goal; if none does, the nearest to its limits."""
    met = [point for point in points if goal.is_met(point)]
    if not met:
        return max(points, key=goal.nearness)
    return max(met, key=lambda point: point.goodput_tokens_per_s)


def _relative_error(traces: Sequence[LoadTrace], begin_s: float, end_s: float) -> float:
    """Return the standard error of the throughput, over it, from the parts of the test: its noise."""
    edges = np.linspace(begin_s, end_s, _PARTS + 1)
    parts = [sum(t.tokens_within(a, b) for t in traces) for a, b in pairwise(edges.tolist())]
    mean = float(np.mean(parts))
    return float(np.std(parts, ddof=1)) / mean / math.sqrt(_PARTS) if mean else 0.0
