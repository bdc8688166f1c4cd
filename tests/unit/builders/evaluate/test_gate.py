"""The gate: what is refused, by which rule, and what is said about a sample that is too small to tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.evaluate.comparison import Comparison
from builders.evaluate.gate import DecideBy, GateVerdict, decide
from builders.evaluate.intervals import paired_difference, share
from builders.settings.quantize import Recipe
from builders.settings.verify import GateSettings
from serve.artifacts.certificates import Estimate, TaskAccuracy

RULES: tuple[DecideBy, ...] = ("evidence", "estimate", "proof")
NOTHING = Comparison(0, 0, None, None, None, None, None, None, (), (), ())


def task(both: int, lost: int, gained: int, neither: int, name: str = "quiz") -> TaskAccuracy:
    n = both + lost + gained + neither
    return TaskAccuracy(
        name=name,
        metric="exact_match",
        reference=share(both + lost, n),
        candidate=share(both + gained, n),
        drop=paired_difference(both, lost, gained, neither),
    )


def measured(**figures: object) -> Comparison:
    return Comparison(**{**vars(NOTHING), **figures})


def judge(comparison: Comparison, **gate: object) -> GateVerdict:
    return decide(
        comparison, GateSettings.model_validate({"max_perplexity_ratio": None, "max_kl_divergence": None, **gate})
    )


def estimate(value: float, reach: float) -> Estimate:
    return Estimate(value=value, low=value - reach, high=value + reach, samples=64)


@pytest.mark.parametrize(
    ("table", "passed"),
    [
        ((49, 1, 0, 0), {"evidence": True, "estimate": False, "proof": False}),  # one of fifty is noise
        ((44, 6, 0, 0), {"evidence": False, "estimate": False, "proof": False}),  # six and none gained is not
        ((50, 0, 0, 0), {"evidence": True, "estimate": True, "proof": False}),  # nor is nothing of fifty a proof
        ((900, 6, 6, 1088), {"evidence": True, "estimate": True, "proof": True}),
        ((900, 100, 10, 990), {"evidence": False, "estimate": False, "proof": False}),
        ((12, 0, 8, 30), {"evidence": True, "estimate": True, "proof": True}),  # it is better
    ],
)
def test_drop_of_a_task_by_each_rule(table: tuple[int, int, int, int], passed: dict[DecideBy, bool]) -> None:
    for rule in RULES:
        assert judge(measured(tasks=(task(*table),)), decide_by=rule).passed is passed[rule], rule


@given(st.integers(0, 300), st.integers(0, 60), st.integers(0, 60), st.integers(0, 300))
def test_what_is_certain_is_the_same_by_every_rule(both: int, lost: int, gained: int, neither: int) -> None:
    if not both + lost + gained + neither:
        return
    comparison = measured(tasks=(task(both, lost, gained, neither),))
    verdicts = {rule: judge(comparison, decide_by=rule) for rule in RULES}
    (check,) = verdicts["proof"].checks
    assert verdicts["proof"].passed <= verdicts["estimate"].passed <= verdicts["evidence"].passed
    if check.certain:
        assert len({verdict.passed for verdict in verdicts.values()}) == 1
        assert not check.hint
    else:
        assert "too few to tell" in check.hint


def test_reason_gives_measured_and_allowed_value_and_the_setting() -> None:
    (reason,) = judge(measured(tasks=(task(900, 100, 10, 990),))).reasons
    assert reason.startswith("accuracy drop, quiz is 4.50 % (95% interval ")
    assert reason.endswith("2000 samples): more than gate.max_accuracy_drop 1.00 %")


def test_every_task_counts() -> None:
    verdict = judge(measured(tasks=(task(900, 6, 6, 1088, "good"), task(900, 100, 10, 990, "bad"))))
    assert [check.passed for check in verdict.checks] == [True, False]
    assert not verdict.passed


def test_limits_of_both_directions() -> None:
    figures = measured(
        greedy_agreement=estimate(0.95, 0.01), kl_divergence=estimate(0.05, 0.01), perplexity_ratio=estimate(1.1, 0.01)
    )
    good = judge(figures, min_greedy_agreement=0.9, max_kl_divergence=0.1, max_perplexity_ratio=1.2)
    assert good.passed
    assert all(check.certain for check in good.checks)
    bad = judge(figures, min_greedy_agreement=0.99, max_kl_divergence=0.01, max_perplexity_ratio=1.05)
    assert [reason.split(" is ")[0] for reason in bad.reasons] == [
        "greedy agreement",
        "KL divergence",
        "perplexity ratio",
    ]
    assert "less than gate.min_greedy_agreement 0.99" in bad.reasons[0]


def test_perplexity_that_may_not_have_risen_is_no_evidence() -> None:
    noisy = measured(perplexity_ratio=estimate(1.06, 0.2), tasks=(task(900, 6, 6, 1088),))
    assert judge(noisy, max_perplexity_ratio=1.05, decide_by="evidence").passed
    assert not judge(noisy, max_perplexity_ratio=1.05, decide_by="estimate").passed
    assert not judge(
        measured(perplexity_ratio=estimate(1.06, 0.02)), max_perplexity_ratio=1.05, decide_by="evidence"
    ).passed


@pytest.mark.parametrize(
    ("recipe", "passed"),
    [("none", False), ("int8_weight_only", False), ("fp8", False), ("int4_awq", True), ("nvfp4", True)],
)
def test_unless_said_otherwise_the_divergence_of_8_bits_is_limited(recipe: Recipe, passed: bool) -> None:
    far = measured(kl_divergence=estimate(0.06, 0.01), tasks=(task(900, 6, 6, 1088),))
    assert decide(far, GateSettings(), recipe).passed is passed
    assert decide(far, GateSettings(max_kl_divergence=0.1), recipe).passed
    assert not decide(far, GateSettings(max_kl_divergence=0.01), recipe).passed
    assert decide(far, GateSettings(max_kl_divergence=None), recipe).passed
    assert decide(measured(tasks=far.tasks), GateSettings(), recipe).passed  # an engine that cannot tell it


def test_what_was_asked_for_and_could_not_be_measured_is_refused() -> None:
    known = {"tasks": (task(900, 6, 6, 1088),)}
    for gate in ({"min_greedy_agreement": 0.9}, {"max_kl_divergence": 0.1}):
        assert not judge(measured(**known), **gate).passed
    assert not judge(measured(**known, unmeasured_tasks=("choices",))).passed


def test_perplexity_that_an_engine_cannot_tell_is_left_out_unless_a_proof_is_wanted() -> None:
    known = measured(tasks=(task(900, 6, 6, 1088),))
    verdict = judge(known, max_perplexity_ratio=1.05)
    assert verdict.passed
    assert "was not measured" in verdict.checks[-1].reason
    assert not judge(known, max_perplexity_ratio=1.05, decide_by="proof").passed


def test_a_gate_that_measured_nothing_at_all_refuses() -> None:
    verdict = decide(NOTHING, GateSettings())
    assert not verdict.passed
    assert verdict.reasons[0].startswith("nothing that the gate looks at could be measured")


def test_a_gate_without_limits_passes_everything() -> None:
    assert judge(NOTHING, max_accuracy_drop=None).passed


def test_a_figure_that_is_no_number_is_refused() -> None:
    broken = Estimate(value=float("nan"), low=float("nan"), high=float("nan"), samples=64)
    for rule in RULES:
        assert not judge(measured(kl_divergence=broken), max_kl_divergence=1.0, decide_by=rule).passed
