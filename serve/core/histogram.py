"""Histogram: values by size, counted for a metric."""

from bisect import bisect_left
from itertools import accumulate


class Histogram:
    """Values by size. Recording one costs a fraction of a microsecond.

    Args:
        bounds: Upper bounds of the buckets, ascending; +Inf follows.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, in the metric's unit."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        """Return (upper bound, values up to it) for each bucket, and the sum of all values."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum
