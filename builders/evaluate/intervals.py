"""PURE: confidence intervals of the figures by which a candidate is judged.

| figure | interval |
|---|---|
| a share (accuracy of one side, outputs that are the same) | Wilson's score interval |
| a difference of two shares on the same questions | Newcombe's method 10, from the four counts of the paired table |
| a ratio of sums over texts (KL a token, perplexity, agreement) | linearised, with Student's t: texts are the sample |

Tokens of one text are not independent, so that what is counted by token has the wider of two intervals: as if tokens
were the sample, which holds where few differ, and with texts as the sample, which holds where errors come in bursts.

Sources: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); Newcombe,
"Improved confidence intervals for the difference between binomial proportions based on paired data", Statistics in
Medicine 17 (1998), 2635-2650, method 10; Cochran, "Sampling Techniques", 3rd ed. (1977), section 6.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

from serve.artifacts.certificates import Estimate

CONFIDENCE = 0.95


def share(successes: int, samples: int, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate a share by Wilson's interval.

    Args:
        successes: How many of the samples.
        samples: At least one.
        confidence: Of the interval.
    """
    if not 0 <= successes <= samples or not samples:
        raise ValueError(f"{successes=} of {samples=}")
    value = successes / samples
    low, high = _wilson(value, samples, confidence)
    return Estimate(value=value, low=low, high=high, samples=samples, confidence=confidence)


def paired_difference(both: int, first: int, second: int, neither: int, confidence: float = CONFIDENCE) -> Estimate:
    """Estimate by how much the first share exceeds the second, on the same samples.

    Args:
        both: Samples where both succeeded.
        first: Where the first alone did.
        second: Where the second alone did.
        neither: Where neither did.
        confidence: Of the interval.
    """
    n = both + first + second + neither
    if not n or min(both, first, second, neither) < 0:
        raise ValueError(f"a table of {both=}, {first=}, {second=}, {neither=}")
    p1, p2 = (both + first) / n, (both + second) / n
    (low1, high1), (low2, high2) = (_wilson(p, n, confidence) for p in (p1, p2))
    phi = _correlation(both, first, second, neither)
    below1, above1, below2, above2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    down = math.sqrt(max(0.0, below1**2 - 2 * phi * below1 * above2 + above2**2))
    up = math.sqrt(max(0.0, above1**2 - 2 * phi * above1 * below2 + below2**2))
    value = (first - second) / n
    return Estimate(
        value=value, low=max(-1.0, value - down), high=min(1.0, value + up), samples=n, confidence=confidence
    )


def ratio_of_sums(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate sum(numerators) / sum(denominators), where each pair is one independent sample.

    Args:
        numerators: One a sample, of two samples or more.
        denominators: Their weights, positive.
        confidence: Of the interval.
    """
    y, x = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if y.shape != x.shape or len(y) < 2 or (x <= 0).any():
        raise ValueError("a ratio needs two samples or more, each with a positive weight")
    value, n = float(y.sum() / x.sum()), len(y)
    residuals = y - value * x
    error = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(x.sum())
    reach = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return Estimate(value=value, low=value - reach, high=value + reach, samples=n, confidence=confidence)


def wider(first: Estimate, second: Estimate, lowest: float = -1.0, highest: float = 1.0) -> Estimate:
    """Return the first estimate with the wider of both intervals, in the figure's own range."""
    low, high = min(first.low, second.low), max(first.high, second.high)
    return first.model_copy(update={"low": max(lowest, low), "high": min(highest, high)})


def samples_needed(estimate: Estimate, limit: float) -> int | None:
    """Return about how many samples would tell on which side of a limit a figure is; None: no number would.

    The interval shrinks with the square root of the sample.
    """
    margin = abs(limit - estimate.value)
    reach = estimate.high - estimate.value if limit >= estimate.value else estimate.value - estimate.low
    if not margin or not math.isfinite(reach / margin):
        return None
    return math.ceil(estimate.samples * (reach / margin) ** 2)


def _wilson(p: float, n: int, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends rounding alone would leave the share itself outside.
    return min(p, max(0.0, middle - reach)), max(p, min(1.0, middle + reach))


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Return Newcombe's phi: the correlation of the table, with his correction for continuity."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not margins:
        return 0.0
    n = both + first + second + neither
    determinant = both * neither - first * second
    if determinant > 0:
        determinant = max(0, determinant - n / 2)  # type: ignore[assignment]
    return determinant / math.sqrt(margins)
