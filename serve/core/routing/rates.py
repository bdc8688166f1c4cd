"""LearnedRates: how fast one replica computes, learned from its load reports while it serves.

The time that an engine was busy between two reports is explained by what it did meanwhile:

    busy_s = token * prompt tokens + pair * attention pairs of prompts
             + step * steps + sequence * output tokens + context * (tokens whose keys and values were read)

by non-negative least squares with exponential forgetting. So GPUs of different kinds, quantizations and tensor
parallelism need no configuration, and a GPU that is throttled is noticed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve.core.routing.load import LoadReport

_FEATURES = 5
# Typical size of each feature in a second: keeps the numbers of one size.
_SCALE = np.array([2e4, 1e8, 50.0, 1e3, 1e7])
_FORGET = 0.98  # weight of all that was seen before, for each second that the engine was busy
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

    def decode_step_s(self, running: float, context_tokens: float) -> float:
        """Return how long a decode step takes."""
        return self.step_s + self.sequence_s * running + self.context_s * context_tokens


# A mid-size model on a current GPU; only order of magnitude, and gone after a second of traffic.
PRIOR = Rates(2e-5, 5e-10, 5e-3, 1e-5, 2e-8)


class LearnedRates:
    """What one replica's reports say of its speed. Starts with `prior`."""

    def __init__(self, prior: Rates = PRIOR) -> None:
        self.rates = prior
        self.known = False
        self._prior = np.array(prior)
        self._gram = np.zeros((_FEATURES, _FEATURES))
        self._moment = np.zeros(_FEATURES)
        self._window = [0.0] * _FEATURES
        self._window_s = 0.0
        self._seen_s = 0.0
        self._fitted_s = 0.0

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
        window[4] += steps * 0.5 * (before.context_tokens + after.context_tokens)
        self._window_s += busy_s
        return self._window_s >= _WINDOW_S and self._take_window()

    def _take_window(self) -> bool:
        busy_s, row = self._window_s, np.array(self._window) / _SCALE
        self._window, self._window_s = [0.0] * _FEATURES, 0.0
        keep = _FORGET**busy_s
        # Divided by the time: the error of a long interval is larger than that of a short one.
        self._gram = keep * self._gram + np.outer(row, row) / busy_s
        self._moment = keep * self._moment + row
        self._seen_s += busy_s
        if self.known and self._seen_s - self._fitted_s < _REFIT_S:
            return False
        self._fit()
        return True

    def _fit(self) -> None:
        self._fitted_s = self._seen_s
        # The prior pulls weakly, in proportion to what was seen of each feature, whatever its size on this hardware;
        # and alone where nothing was seen.
        seen = np.diagonal(self._gram)
        ridge = np.diag(_RIDGE * seen + 1e-9 * max(1e-12, float(seen.sum())))
        gram, moment = self._gram + ridge, self._moment + ridge @ (self._prior * _SCALE)
        self.rates = Rates(*(_non_negative(gram, moment) / _SCALE).tolist())
        self.known = True


def _non_negative(gram: npt.NDArray[np.float64], moment: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
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
