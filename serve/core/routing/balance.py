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
        self._sums = np.zeros((3, 1))  # of the rows of the table, kept along with them
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
        self._sums *= self._keep
        self._change(row, 1.0, work_s)

    def take_back(self, row: int, work_s: float) -> None:
        """Undo a `count`; nearly, if others came in between."""
        requests, spent_s, _ = self._table[:, row].tolist()
        self._change(row, -min(1.0, requests), -min(work_s, spent_s))

    def shares(self, rows: Rows, due: Column) -> Shares:
        """Return what these rows had.

        Args:
            rows: At least one.
            due: How many times the mean's requests each of them may have, >= 1: a replica with a faster GPU gets more.
                One with a slower GPU is not due fewer, as they may be the short ones.
        """
        counts = self._table[:, rows]
        number = max(1, len(rows))
        sums = self._sums if len(rows) == self._replicas else np.add.reduce(counts, axis=1, keepdims=True)
        requests, work_s, lasting = sums[:, 0].tolist()
        each_s = work_s / requests if requests > 0.0 else 1.0
        lasting_scale = number / (lasting + number * _LASTING_SMOOTHING)
        return Shares(
            (counts[0] + _SMOOTHING) * (number / (requests + number * _SMOOTHING)) / due,
            (counts[1] + _SMOOTHING * each_s) * (number / max(work_s + number * _SMOOTHING * each_s, 1e-12)),
            (counts[2] + _LASTING_SMOOTHING) * lasting_scale / due,
        )

    def _change(self, row: int, requests: float, work_s: float) -> None:
        table, sums = self._table, self._sums
        for number, change in enumerate((requests, work_s, requests)):
            table[number, row] += change
            sums[number, 0] += change

    def _set_replicas(self, replicas: int) -> None:
        self._replicas = replicas
        self._sums = np.add.reduce(self._table, axis=1, keepdims=True)
        halves = (HALF_LIFE, HALF_LIFE, LASTING_HALF_LIFE)
        self._keep = np.array([[0.5 ** (1.0 / (half * max(1, replicas)))] for half in halves])
