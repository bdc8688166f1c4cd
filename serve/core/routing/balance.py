"""Balance: how many requests, and how much work, went to each replica lately.

Counted in decisions, not in seconds: the memory spans the same number of requests a replica at any rate of traffic.
"""

from typing import NamedTuple

import numpy as np

from serve.core.routing.decision import Column, Rows

HALF_LIFE = 50.0  # requests a replica: of what a price on imbalance looks at
LASTING_HALF_LIFE = 500.0  # of what a limit looks at: for a while one replica may well have more of the short requests
_SMOOTHING = 4.0  # requests that each replica is taken to have had besides: a few are chance, not imbalance
_LASTING_SMOOTHING = 16.0


class Shares(NamedTuple):
    """How much each replica had, relative to the mean: 1 everywhere is balance.

    Attributes:
        requests: Requests, over what a faster replica is due.
        work: Time of work.
        lasting: As `requests`, over a longer time.
    """

    requests: Column
    work: Column
    lasting: Column


class Balance:
    """Decaying counts, by row."""

    def __init__(self) -> None:
        self._table = np.zeros((3, 8))
        self._keep = np.ones((3, 1))
        self._replicas = 0

    def add(self, row: int, others: list[int]) -> None:
        """Begin to count for a row; a newcomer owes the others no work."""
        if row >= self._table.shape[1]:
            room = max(row + 1, 2 * self._table.shape[1])
            self._table = np.pad(self._table, ((0, 0), (0, room - self._table.shape[1])))
        self._table[:, row] = self._table[:, others].mean(axis=1) if others else 0.0
        self._set_replicas(self._replicas + 1)

    def remove(self, row: int) -> None:
        """Forget a row."""
        self._table[:, row] = 0.0
        self._set_replicas(self._replicas - 1)

    def count(self, row: int, work_s: float) -> None:
        """Count a request; everything older fades."""
        self._table *= self._keep
        self._table[:, row] += (1.0, work_s, 1.0)

    def take_back(self, row: int, work_s: float) -> None:
        """Undo a `count`; nearly, if others came in between."""
        self._table[:, row] = np.maximum(self._table[:, row] - (1.0, work_s, 1.0), 0.0)

    def shares(self, rows: Rows, speed: Column) -> Shares:
        """Return what these rows had.

        Args:
            rows: At least one.
            speed: Of each, in any unit, > 0. A replica with a faster GPU is due more of the requests; one with a
                slower GPU is not due fewer, as they may be the short ones.
        """
        counts = self._table[:, rows]
        sums = np.add.reduce(counts, axis=1)
        each_s = sums[1] / sums[0] if sums[0] > 0.0 else 1.0
        counts += ((_SMOOTHING,), (_SMOOTHING * each_s,), (_LASTING_SMOOTHING,))
        counts *= len(rows) / np.maximum(np.add.reduce(counts, axis=1, keepdims=True), 1e-12)
        due = np.maximum(1.0, len(rows) * speed / np.add.reduce(speed))
        return Shares(counts[0] / due, counts[1], counts[2] / due)

    def _set_replicas(self, replicas: int) -> None:
        self._replicas = replicas
        halves = (HALF_LIFE, HALF_LIFE, LASTING_HALF_LIFE)
        self._keep = np.array([[0.5 ** (1.0 / (half * max(1, replicas)))] for half in halves])
