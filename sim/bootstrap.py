"""Paired bootstrap over time blocks: how much of a difference between two policies is chance.

All policies were given the same requests, so they are compared on the same resampled requests. Whole blocks of
consecutive requests are drawn, because requests that are close in time share queues and caches.

Source: Künsch, "The jackknife and the bootstrap for general stationary observations", 1989.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK = 256  # resamples at once: bounds the memory
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether it may be zero, or is no number."""
        return not (self.low > 0.0 or self.high < 0.0)


class Resampler:
    """Draws requests again, in blocks; the same draws for every policy.

    Args:
        count: Requests, in the order of their arrival.
        blocks: Into which these are cut.
        resamples: How often.
        seed: Of the draws.
    """

    def __init__(self, count: int, blocks: int = 40, resamples: int = 2000, seed: int = 0) -> None:
        self._blocks = max(1, min(blocks, count // 5))
        self._block_of = np.arange(count) * self._blocks // max(1, count)
        rng = np.random.default_rng(seed)
        self._weights = rng.multinomial(self._blocks, np.full(self._blocks, 1.0 / self._blocks), size=resamples)
        sizes = np.bincount(self._block_of, minlength=self._blocks)
        self._totals = self._weights @ sizes

    def mean(self, column: Column) -> Column:
        """Return the mean of a column in each resample."""
        sums = np.bincount(self._block_of, weights=column, minlength=self._blocks)
        return (self._weights @ sums) / self._totals

    def percentile(self, column: Column, share: float) -> Column:
        """Return in each resample the smallest value that at least `share` of the requests do not exceed."""
        order = np.argsort(column, kind="stable")
        blocks, values = self._block_of[order], column[order]
        found = np.empty(len(self._weights))
        for first in range(0, len(self._weights), _CHUNK):
            weights = self._weights[first : first + _CHUNK]
            reached = np.cumsum(weights[:, blocks], axis=1, dtype=np.int32)
            wanted = np.ceil(share * self._totals[first : first + _CHUNK])
            found[first : first + _CHUNK] = values[(reached >= wanted[:, None]).argmax(axis=1)]
        return found


def difference(value: float, resampled: Column, confidence: float) -> Difference:
    """Return an estimate with its percentile interval. Where resamples are undefined, the interval is unbounded."""
    if not np.isfinite(resampled).all():
        return Difference(value, -np.inf, np.inf)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(resampled, [tail, 100.0 - tail]).tolist()
    return Difference(value, low, high)
