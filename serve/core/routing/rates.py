"""LearnedRates: how fast one replica computes, learned from its load reports while it serves.

The time that an engine was busy between two reports is explained by what it did meanwhile:

    busy_s = token * prompt tokens + pair * attention pairs of prompts
             + step * steps + sequence * output tokens + context * (tokens whose keys and values were read)

by non-negative least squares with exponential forgetting. So GPUs of different kinds, quantizations and tensor
parallelism need no configuration, and a GPU that is throttled is noticed.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from serve.core.routing.load import LoadReport

_Array = npt.NDArray[np.float64]
_Float = TypeVar("_Float", float, _Array)
_FEATURES = 5
# Typical size of each feature in a second: keeps the numbers of one size.
_SCALE = np.array([2e4, 1e8, 50.0, 1e3, 1e7])
_FORGET = 0.98  # weight of all that was seen before, for each second that the engine was busy
_FORGET_FLEET = 0.998
_LEAN_S = 5.0  # of the fleet's evidence that counts as a replica's own
_RIDGE = 1e-3  # of the squares seen
_WINDOW_S = 0.25  # busy seconds that are looked at together: a report cuts steps, a window of many only the outer ones
_REFIT_S = 1.0  # busy seconds between fits


class Rates(NamedTuple):
    """Seconds of an engine's time.

    Attributes:
        token_s: For each prompt token computed.
        pair_s: For each (query, key) pair of its attention.
        step_s: For each step.
        sequence_s: For each output token.
        context_s: For each token whose keys and values a decode step reads.
    """

    token_s: float
    pair_s: float
    step_s: float
    sequence_s: float
    context_s: float

    def decode_step_s(self, running: _Float, context_tokens: _Float) -> _Float:
        """Return how long a decode step takes; of numbers or of columns."""
        return self.step_s + self.sequence_s * running + self.context_s * context_tokens


# A mid-size model on a current GPU; only order of magnitude, and gone after a second of traffic.
PRIOR = Rates(2e-5, 5e-10, 5e-3, 1e-5, 2e-8)
_PRIOR = np.array(PRIOR) * _SCALE


class FleetRates:
    """What the reports of all replicas of a model say together: what is believed of one that has said little."""

    def __init__(self) -> None:
        self.rates = PRIOR
        self._evidence = _Evidence(_FORGET_FLEET)

    def learn(self, row: _Array, busy_s: float) -> None:
        """Take in what some replica did in `busy_s`, as (features,) scaled."""
        if self._evidence.add(row, busy_s):
            self.rates = Rates(*(self._evidence.solve(_PRIOR, np.zeros_like(self._evidence.gram)) / _SCALE).tolist())

    def second(self) -> _Array:
        """Return the evidence of one average second of all replicas, (features, features)."""
        return self._evidence.gram / max(self._evidence.weight_s, 1e-9)


class LearnedRates:
    """What one replica's reports say of its speed.

    Args:
        fleet: Told of all that is learned; some seconds of its evidence count as this replica's own, so that nobody is
            taken for infinitely fast because of what its first reports did not happen to show.
    """

    def __init__(self, fleet: FleetRates) -> None:
        self.rates = fleet.rates
        self.known = False
        self._fleet = fleet
        self._evidence = _Evidence(_FORGET)
        self._window = [0.0] * _FEATURES
        self._window_s = 0.0

    def learn(self, before: LoadReport, after: LoadReport) -> bool:
        """Take in what happened between two consecutive reports of one epoch; return whether `rates` are new."""
        busy_s, steps = after.busy_s - before.busy_s, after.steps - before.steps
        if busy_s <= 0.0 or steps <= 0:
            return False
        window = self._window
        window[0] += after.prefilled_tokens - before.prefilled_tokens
        window[1] += after.prefilled_pairs - before.prefilled_pairs
        window[2] += steps
        window[3] += after.generated_tokens - before.generated_tokens
        window[4] += after.read_tokens - before.read_tokens
        self._window_s += busy_s
        return self._window_s >= _WINDOW_S and self._take_window()

    def _take_window(self) -> bool:
        busy_s, row = self._window_s, np.array(self._window) / _SCALE
        self._window, self._window_s = [0.0] * _FEATURES, 0.0
        self._fleet.learn(row, busy_s)
        if not self._evidence.add(row, busy_s):
            return False
        solution = self._evidence.solve(np.array(self._fleet.rates) * _SCALE, _LEAN_S * self._fleet.second())
        self.rates = Rates(*(solution / _SCALE).tolist())
        self.known = True
        return True


class _Evidence:
    """Normal equations of a least-squares fit, that fade."""

    def __init__(self, forget: float) -> None:
        self.gram = np.zeros((_FEATURES, _FEATURES))
        self.weight_s = 0.0
        self._forget = forget
        self._moment = np.zeros(_FEATURES)
        self._since_s = _REFIT_S  # since the last fit

    def add(self, row: _Array, busy_s: float) -> bool:
        """Add what was done in a time; return whether a fit is due."""
        keep = self._forget**busy_s
        # Divided by the time: the error of a long interval is larger than that of a short one.
        self.gram = keep * self.gram + np.outer(row, row) / busy_s
        self._moment = keep * self._moment + row
        self.weight_s = keep * self.weight_s + busy_s
        self._since_s += busy_s
        if self._since_s < _REFIT_S:
            return False
        self._since_s = 0.0
        return True

    def solve(self, prior: _Array, prior_gram: _Array) -> _Array:
        """Return the rates, scaled, that explain it best.

        Args:
            prior: What is believed without evidence, scaled.
            prior_gram: Evidence for it.
        """
        seen = np.diagonal(self.gram)
        # Weakly, in proportion to what was seen of each feature, and alone where nothing was seen.
        ridge = prior_gram + np.diag(_RIDGE * seen + 1e-9 * max(1e-12, float(seen.sum())))
        return _non_negative(self.gram + ridge, self._moment + ridge @ prior)


def _non_negative(gram: _Array, moment: _Array) -> _Array:
    """Solve gram @ x = moment, leaving out what would become negative, one at a time."""
    free = np.arange(len(moment))
    while True:
        solution = np.linalg.solve(gram[np.ix_(free, free)], moment[free])
        if len(free) == 1 or solution.min() >= 0.0:
            break
        free = np.delete(free, int(solution.argmin()))
    full = np.zeros(len(moment))
    full[free] = np.maximum(solution, 0.0)
    return full
