"""recommend: which policy serves a workload best, and how sure that is.

Goodput decides. Among the policies whose goodput may be as good as the best one's, TTFT p90 decides; and among those
where this may be as good, too, the configured policy stays, then one with default parameters is preferred to a tuned
one. "May be as good": the difference is less than 1 %, or its simultaneous 95 % confidence interval, by paired
bootstrap over time blocks with Bonferroni's correction for the number of candidates, holds zero. So the more
candidates, the more it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml
from pydantic import ValidationError

from serve.core.routing.settings import RoutingSettings
from sim.bootstrap import Column, Difference, Resampler, difference
from sim.metrics import meets
from sim.policies import Candidate
from sim.slo import Slo
from sim.study import Result

_CONFIDENCE = 0.95
_TTFT_SHARE = 0.9
_OF_TIERS = frozenset({"host_cost", "disk_cost"})
_NEGLIGIBLE = 0.01  # of the better one's figure


@dataclass(frozen=True)
class Comparison:
    """The recommended policy against another one; positive goodput and negative TTFT are in its favour.

    Attributes:
        against: The other one's label.
        goodput_per_s: Difference in requests a second that meet the SLO.
        ttft_p90_s: Difference in TTFT p90; refused requests count as never answered.
    """

    against: str
    goodput_per_s: Difference
    ttft_p90_s: Difference

    @property
    def is_noise(self) -> bool:
        """Whether neither difference is more than chance."""
        return self.goodput_per_s.is_noise and self.ttft_p90_s.is_noise


@dataclass(frozen=True)
class Recommendation:
    """What to configure.

    Attributes:
        candidate: The policy.
        config_line: For the model's section in the config file.
        replicas: For which fleet.
        comparisons: Against the configured policy, if it is another one, and the runner-up.
        equals: Labels of all candidates that may be as good.
    """

    candidate: Candidate
    config_line: str
    replicas: int
    comparisons: tuple[Comparison, ...]
    equals: tuple[str, ...]


@dataclass(frozen=True)
class _Entrant:
    candidate: Candidate
    goodput: float
    goodputs: Column
    p90: float
    p90s: Column

    @property
    def policy(self) -> str:
        return self.candidate.label.partition(":")[0]

    @property
    def parameters(self) -> int:
        return len(self.candidate.settings.model_fields_set - {"policy", *RoutingSettings.model_fields})


def recommend(results: Sequence[Result], slo: Slo, configured: str | None, seed: int = 0) -> Recommendation:
    """Choose among the results of one fleet size.

    Args:
        results: Of one workload; at least one.
        slo: What counts as served well.
        configured: Label of the candidate that is in use; None: none is.
        seed: Of the bootstrap.
    """
    resampler = Resampler(len(results[0].outcome.arrival_s), seed=seed)
    entrants = [_enter(result, slo, resampler) for result in results]
    confidence = 1.0 - (1.0 - _CONFIDENCE) / max(1, len(entrants) - 1)
    best = max(entrants, key=lambda e: (e.goodput, -e.p90))
    leaders = [e for e in entrants if e is best or _is_small(_goodput(best, e, confidence), best.goodput)]
    fastest = min(leaders, key=lambda e: e.p90)
    equals = [e for e in leaders if e is fastest or _is_small(_p90(fastest, e, confidence), fastest.p90)]
    chosen = min(equals, key=lambda e: (e.candidate.label != configured, e.parameters, e.p90))
    others = [e for e in entrants if e is not chosen]
    shown = [e for e in others if e.candidate.label == configured]
    rest = [e for e in others if e.candidate.label != configured]
    # How another policy does says more than how the same one does with other parameters.
    rest = [e for e in rest if e.policy != chosen.policy] or rest
    if rest:
        shown.append(min(rest, key=lambda e: (e not in leaders, e.p90 if e in leaders else -e.goodput)))
    return Recommendation(
        candidate=chosen.candidate,
        config_line=config_line(chosen.candidate.settings),
        replicas=results[0].case.replicas,
        comparisons=tuple(
            Comparison(e.candidate.label, _goodput(chosen, e, confidence), _p90(chosen, e, confidence)) for e in shown
        ),
        equals=tuple(e.candidate.label for e in equals if e is not chosen),
    )


def config_line(settings: RoutingSettings) -> str:
    """Return the line for a model's section of a config file."""
    section = settings.model_dump(exclude_unset=True)
    named = {"policy": section.pop("policy", "auto"), **section}
    return f"routing: {yaml.safe_dump(named, default_flow_style=True, sort_keys=False, width=1000).strip()}"


def predictive_grid(default: Candidate) -> list[Candidate]:
    """Return variants of a candidate with default parameters: each positive real parameter halved, and doubled.

    Those of slower tiers of the cache are left out: simulated caches have none.
    """
    variants = []
    for name, field in type(default.settings).model_fields.items():
        if (
            name in RoutingSettings.model_fields
            or name in _OF_TIERS
            or not isinstance(field.default, float)
            or field.default <= 0.0
        ):
            continue
        for factor in (0.5, 2.0):
            value = field.default * factor
            try:
                settings = type(default.settings).model_validate(
                    {**default.settings.model_dump(exclude_unset=True), name: value}
                )
            except ValidationError:  # beyond what the parameter may be
                continue
            variants.append(Candidate(f"{default.label}:{name}={value:g}", settings))
    return variants


def _enter(result: Result, slo: Slo, resampler: Resampler) -> _Entrant:
    outcome = result.outcome
    rate = len(outcome.arrival_s) / (float(outcome.arrival_s[-1]) or outcome.end_of_all_s or 1.0)
    met = meets(outcome, slo).astype(np.float64)
    ttft_s = np.where(outcome.served, outcome.ttft_s, np.inf)
    return _Entrant(
        candidate=result.case.candidate,
        goodput=float(met.mean()) * rate,
        goodputs=resampler.mean(met) * rate,
        p90=float(np.percentile(ttft_s, 100.0 * _TTFT_SHARE, method="inverted_cdf")),
        p90s=resampler.percentile(ttft_s, _TTFT_SHARE),
    )


def _is_small(gap: Difference, figure: float) -> bool:
    return gap.is_noise or abs(gap.value) < _NEGLIGIBLE * figure


def _goodput(one: _Entrant, other: _Entrant, confidence: float) -> Difference:
    return difference(one.goodput - other.goodput, one.goodputs - other.goodputs, confidence)


def _p90(one: _Entrant, other: _Entrant, confidence: float) -> Difference:
    with np.errstate(invalid="ignore"):  # two policies that both refuse a tenth
        return difference(one.p90 - other.p90, one.p90s - other.p90s, confidence)
