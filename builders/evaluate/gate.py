"""PURE: what was measured -> whether it may be published.

A figure is measured on a sample, so it has an interval, and the limit can lie inside it: then the sample is too small
to tell. What counts then is `GateSettings.decide_by`:

| `decide_by` | refused if | a sample that is too small |
|---|---|---|
| evidence | the estimate is beyond the limit, and the interval shows any change for the worse | passes, with a hint |
| estimate | the estimate is beyond the limit | passes or fails by luck, with a hint |
| proof | any part of the interval is beyond the limit | is refused, with a hint |

`estimate` is the default: what is published was measured to keep the limit. Where one flipped answer of fifty, two
percent, is to say nothing, `evidence` refuses only a loss that shows: six of fifty, and none gained. A drop that is
certain to exceed the limit is refused, and one certain to keep it passes, in every way of deciding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from builders.evaluate.comparison import Comparison
from builders.evaluate.intervals import samples_needed
from builders.settings.quantize import Recipe
from builders.settings.verify import GateSettings
from serve.artifacts.certificates import Estimate, GateCheck

DecideBy = Literal["evidence", "estimate", "proof"]


@dataclass(frozen=True)
class GateVerdict:
    """What the gate says.

    Attributes:
        passed: Whether it may be published.
        reasons: Why not; each with the measured and the allowed value.
        checks: All limits that were looked at.
    """

    passed: bool
    reasons: tuple[str, ...]
    checks: tuple[GateCheck, ...]


@dataclass(frozen=True)
class _Limit:
    """One limit: how the figure is called, its setting, and its value where nothing has changed."""

    name: str
    setting: str
    value: float
    unchanged: float
    at_least: bool = False
    as_percent: bool = False

    def shown(self, value: float) -> str:
        return f"{100 * value:.2f} %" if self.as_percent else f"{value:.5g}"


def decide(comparison: Comparison, gate: GateSettings, recipe: Recipe = "none") -> GateVerdict:
    """Decide about a candidate, whose weights are of a recipe."""
    checks = list(_checks(comparison, gate, recipe))
    reasons = [check.reason for check in checks if not check.passed]
    if checks and all(check.measured is None for check in checks):
        reasons = ["nothing that the gate looks at could be measured: " + "; ".join(check.reason for check in checks)]
    return GateVerdict(not reasons, tuple(reasons), tuple(checks))


def _checks(comparison: Comparison, gate: GateSettings, recipe: Recipe) -> Iterable[GateCheck]:
    if gate.max_accuracy_drop is not None:
        for task in comparison.tasks:
            yield check_limit(_drop(task.name, gate.max_accuracy_drop), task.drop, gate.decide_by)
        for name in comparison.unmeasured_tasks:
            yield _unmeasured(_drop(name, gate.max_accuracy_drop), passed=False)
    if gate.min_greedy_agreement is not None:
        limit = _Limit("greedy agreement", "min_greedy_agreement", gate.min_greedy_agreement, 1.0, at_least=True)
        yield _check(limit, comparison.greedy_agreement, gate.decide_by, needed=True)
    # Defaults of the settings: engines that cannot tell probabilities are judged by the rest.
    if (kl_limit := gate.kl_limit(recipe)) is not None:
        limit = _Limit("KL divergence", "max_kl_divergence", kl_limit, 0.0)
        needed = gate.decide_by == "proof" or gate.max_kl_divergence != "auto"
        yield _check(limit, comparison.kl_divergence, gate.decide_by, needed=needed)
    if gate.max_perplexity_ratio is not None:
        limit = _Limit("perplexity ratio", "max_perplexity_ratio", gate.max_perplexity_ratio, 1.0)
        yield _check(limit, comparison.perplexity_ratio, gate.decide_by, needed=gate.decide_by == "proof")


def _drop(task: str, limit: float) -> _Limit:
    return _Limit(f"accuracy drop, {task}", "max_accuracy_drop", limit, 0.0, as_percent=True)


def _check(limit: _Limit, measured: Estimate | None, decide_by: DecideBy, *, needed: bool) -> GateCheck:
    if measured is None:
        return _unmeasured(limit, passed=not needed)
    return check_limit(limit, measured, decide_by)


def check_limit(limit: _Limit, measured: Estimate, decide_by: DecideBy) -> GateCheck:
    """Compare a figure with its limit."""
    sign = -1.0 if limit.at_least else 1.0  # from here on, more is worse
    value, allowed = sign * measured.value, sign * limit.value
    low, high = sorted((sign * measured.low, sign * measured.high))
    nothing = min(sign * limit.unchanged, allowed)
    broken, kept = low > allowed, high <= allowed
    match decide_by:
        case "evidence":
            passed = not (value > allowed and low > nothing)
        case "estimate":
            passed = value <= allowed
        case "proof":
            passed = kept
    if not all(map(math.isfinite, (value, low, high))):
        passed = broken = False
    certain = kept or broken
    return GateCheck(
        name=limit.name,
        measured=measured,
        limit=limit.value,
        at_least=limit.at_least,
        passed=passed,
        certain=certain,
        reason="" if passed else _reason(limit, measured, by_estimate=value > allowed),
        hint="" if certain else _hint(limit, measured),
    )


def _unmeasured(limit: _Limit, *, passed: bool) -> GateCheck:
    return GateCheck(
        name=limit.name,
        limit=limit.value,
        at_least=limit.at_least,
        passed=passed,
        certain=False,
        reason=f"{limit.name} was not measured, and gate.{limit.setting} is {limit.value:g}; the notes say why",
    )


def _reason(limit: _Limit, measured: Estimate, *, by_estimate: bool) -> str:
    interval = f"{measured.confidence:.0%} interval {limit.shown(measured.low)} to {limit.shown(measured.high)}"
    told = f"{limit.name} is {limit.shown(measured.value)} ({interval}, {measured.samples} samples)"
    border = f"gate.{limit.setting} {limit.shown(limit.value)}"
    if not math.isfinite(measured.value):
        return f"{told}: it is no number; the model computes none"
    if by_estimate:
        return f"{told}: {'less' if limit.at_least else 'more'} than {border}"
    return f"{told}: it is not proven to keep {border}, as decide_by: proof asks for"


def _hint(limit: _Limit, measured: Estimate) -> str:
    needed = samples_needed(measured, limit.value)
    more = f"about {needed} would do" if needed is not None and needed > measured.samples else "many more are needed"
    return (
        f"{limit.name}: {measured.samples} samples are too few to tell whether it keeps {limit.shown(limit.value)} "
        f"({limit.shown(measured.low)} to {limit.shown(measured.high)}); {more}"
    )
