"""A recommendation names the better policy when it is better, and says so when that may be chance."""

import math
from typing import Any

import numpy as np
import pytest
import yaml

from serve.config import parse_app_config
from serve.core.routing.settings import parse_policy
from sim.bootstrap import Resampler, difference
from sim.outcome import Outcome
from sim.policies import Candidate, configured_candidate, parse_candidate
from sim.recommend import config_line, predictive_grid, recommend
from sim.simulator import simulate
from sim.slo import Slo
from sim.study import Case, Result
from sim.workload import SimRequest
from tests.unit.sim.fleets import engine

COUNT = 400


def result(label: str, ttft_s: Any, served: Any = None) -> Result:
    """Return a simulation of 400 requests, one a second, with these times to the first token."""
    arrival_s = np.arange(COUNT, dtype=np.float64)
    served = np.ones(COUNT, dtype=bool) if served is None else served
    first_s = np.where(served, arrival_s + ttft_s, math.nan)
    ones = np.ones(COUNT, dtype=np.int64)
    outcome = Outcome(
        arrival_s=arrival_s,
        first_token_s=first_s,
        end_s=first_s,
        queue_s=first_s * 0.0,
        prompt_tokens=ones,
        cached_tokens=0 * ones,
        output_tokens=ones,
        predicted_ttft_s=first_s,
        replica=np.where(served, 0, -1),
        attempts=ones,
        busy_s=np.ones(1),
        steps=ones[:1],
        end_of_all_s=float(COUNT),
    )
    return Result(Case(parse_candidate(label), 1), outcome, 0.0)


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).lognormal(-2.0, 0.5, COUNT)


def test_the_policy_that_serves_more_requests_well_is_recommended() -> None:
    base = noise(1)
    slow = np.where(np.arange(COUNT) % 4 == 0, 5.0, base)
    advice = recommend([result("round_robin", slow), result("dynamo", base)], Slo(ttft_ms=1000), "round_robin")
    assert advice.candidate.label == "dynamo"
    (against,) = advice.comparisons
    assert against.against == "round_robin"
    assert against.goodput_per_s.value == pytest.approx(0.25 * COUNT / (COUNT - 1), rel=0.02)
    assert 0.15 < against.goodput_per_s.low < against.goodput_per_s.value < against.goodput_per_s.high < 0.35
    assert against.ttft_p90_s.high < 0.0
    assert not against.is_noise
    assert advice.equals == ()


def test_equal_goodput_is_decided_by_the_first_token() -> None:
    advice = recommend([result("round_robin", 2 * noise(1)), result("dynamo", noise(1))], Slo(ttft_ms=9000), None)
    assert advice.candidate.label == "dynamo"
    assert advice.comparisons[0].goodput_per_s.value == 0.0


def test_a_difference_that_may_be_chance_leaves_what_is_configured() -> None:
    results = [result("dynamo", noise(4)), result("round_robin", noise(5)), result("random", noise(3) * 3)]
    advice = recommend(results, Slo(ttft_ms=9000), "round_robin")
    assert advice.candidate.label == "round_robin"
    assert advice.equals == ("dynamo",)
    assert advice.comparisons[0].against == "dynamo"
    assert advice.comparisons[0].is_noise


def test_default_parameters_are_preferred_to_tuned_ones_that_are_no_better() -> None:
    results = [result("dynamo:prefill_load_scale=2", noise(1) * 0.999), result("dynamo", noise(1))]
    assert recommend(results, Slo(ttft_ms=9000), None).candidate.label == "dynamo"


def test_the_runner_up_is_another_policy_if_there_is_one() -> None:
    results = [result(label, noise(1) * factor) for label, factor in (("dynamo", 1), ("random", 3))]
    results.append(result("dynamo:prefill_load_scale=2", noise(1) * 1.5))
    advice = recommend(results, Slo(ttft_ms=9000), None)
    assert [comparison.against for comparison in advice.comparisons] == ["random"]


def test_refusing_requests_does_not_pay() -> None:
    slow = np.arange(COUNT) % 8 == 0
    ttft_s = np.where(slow, 3.0, noise(1))
    results = [result("round_robin", ttft_s), result("dynamo", ttft_s, ~slow)]
    advice = recommend(results, Slo(ttft_ms=1000), None)
    assert advice.candidate.label == "round_robin"
    assert advice.comparisons[0].ttft_p90_s.value == -math.inf


def test_a_single_candidate_is_recommended_against_nobody() -> None:
    advice = recommend([result("dynamo", noise(1))], Slo(), "dynamo")
    assert (advice.candidate.label, advice.comparisons, advice.equals) == ("dynamo", (), ())


def test_the_line_can_be_put_into_a_config_file() -> None:
    for label in ("predictive", "dynamo:prefill_load_scale=2:temperature=0.5", "round_robin"):
        candidate = parse_candidate(label)
        section = yaml.safe_load(config_line(candidate.settings))
        config = parse_app_config({"models": [{"id": "m", **section}]})
        assert config.models[0].routing == candidate.settings


def test_what_else_the_section_says_is_kept() -> None:
    configured = configured_candidate(parse_policy({"policy": "least_tokens", "max_index_blocks": 5000}))
    assert configured is not None
    assert configured.label == "least_tokens"
    kept = parse_candidate("dynamo").beside(configured.settings)
    assert config_line(kept.settings) == "routing: {policy: dynamo, max_index_blocks: 5000}"
    default = configured_candidate(parse_policy({}))
    assert default is not None
    assert default.label == "predictive"


def test_the_grid_halves_and_doubles_each_real_parameter() -> None:
    default = parse_candidate("predictive")
    grid = predictive_grid(default)
    assert len(grid) >= 2
    assert len({candidate.label for candidate in grid}) == len(grid)
    for candidate in grid:
        assert parse_candidate(candidate.label).settings == candidate.settings
        assert candidate.settings != default.settings


def test_a_constructed_workload_on_which_reuse_is_everything() -> None:
    # Four long texts are asked about in turns, and a replica can hold one. Who scatters them computes each anew.
    requests = [
        SimRequest(2.0 * n, 400, 2, (*(1 + 1000 * (n // 3 % 4) + block for block in range(39)), 10**6 + n))
        for n in range(160)
    ]
    candidates = [parse_candidate(label) for label in ("round_robin", "longest_prefix")]
    results = [
        Result(Case(candidate, 4), simulate(requests, [engine(total_blocks=50)] * 4, candidate.make()), 0.0)
        for candidate in candidates
    ]
    advice = recommend(results, Slo(ttft_ms=200, tpot_ms=200), "round_robin")
    assert advice.config_line == "routing: {policy: longest_prefix}"
    assert advice.comparisons[0].goodput_per_s.low > 0.1


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held, trials = 0, 200
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        column = rng.exponential(1.0, COUNT)
        resampler = Resampler(COUNT, resamples=400, seed=seed)
        interval = difference(float(np.percentile(column, 90)), resampler.percentile(column, 0.9), 0.95)
        held += interval.low <= math.log(10.0) <= interval.high
    assert 0.86 * trials <= held <= trials


def test_resampled_percentiles_are_those_of_the_resample() -> None:
    column = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0, 0.0])
    resampler = Resampler(10, blocks=1, resamples=3)  # one block: every resample is the sample
    assert resampler.percentile(column, 0.5).tolist() == [4.0] * 3
    assert resampler.percentile(column, 0.9).tolist() == [8.0] * 3
    assert resampler.mean(column).tolist() == [4.5] * 3


def test_undefined_resamples_are_no_proof() -> None:
    assert difference(1.0, np.array([1.0, math.nan]), 0.95).is_noise
    assert difference(-math.inf, np.array([-math.inf] * 3), 0.95).is_noise


def test_candidates_know_their_names() -> None:
    assert Candidate("x", parse_policy("dynamo")).make().name == "dynamo"
