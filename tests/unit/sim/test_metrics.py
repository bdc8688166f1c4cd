"""Figures of an outcome, computed by hand."""

import math
from typing import Any

import numpy as np
import pytest

from sim.measured import measured
from sim.metrics import Percentiles, meets, spread, summarize
from sim.outcome import Outcome
from sim.slo import Slo
from sim.workload import SimRequest

NAN = math.nan


def outcome(**changes: Any) -> Outcome:
    """Four requests on two replicas; the last was refused."""
    columns: dict[str, Any] = {
        "arrival_s": [0.0, 1.0, 2.0, 4.0],
        "first_token_s": [0.5, 1.25, 5.0, NAN],
        "end_s": [1.5, 1.25, 8.0, NAN],
        "queue_s": [0.0, 0.1, 2.0, NAN],
        "prompt_tokens": [100, 200, 300, 400],
        "cached_tokens": [0, 100, 50, 0],
        "output_tokens": [11, 1, 31, 50],
        "predicted_ttft_s": [0.4, 0.5, 3.0, 9.0],
        "replica": [0, 0, 1, -1],
        "attempts": [1, 1, 1, 2],
        "busy_s": [2.0, 6.0],
        "steps": [10, 20],
        "end_of_all_s": 8.0,
        **changes,
    }
    made: dict[str, Any] = {name: np.array(c) if isinstance(c, list) else c for name, c in columns.items()}
    return Outcome(**made)


def test_every_figure_by_hand() -> None:
    summary = summarize(
        outcome(), "p", Slo(ttft_ms=1000, tpot_ms=100), gpus_per_replica=4, gpu_dollars_per_hour=9.0, wall_s=3.0
    )
    assert (summary.policy, summary.replicas) == ("p", 2)
    assert (summary.requests, summary.finished, summary.refused) == (4, 3, 1)
    assert summary.hit_rate == 150 / 600
    assert summary.ttft_s.p50 == 0.5
    assert summary.ttft_mean_s == pytest.approx(3.75 / 3)
    assert summary.ttft_s.p90 == pytest.approx(0.5 + 0.8 * 2.5)
    assert summary.tpot_s.p50 == pytest.approx(0.1)  # of 0.1 and 0.1; one output has a single token
    assert summary.queue_s.p50 == 0.1
    # The first two met both limits; arrivals took 4 s.
    assert (summary.goodput_per_s, summary.goodput_share) == (0.5, 0.5)
    assert summary.spread_requests == pytest.approx(2 / 1.5)
    assert summary.spread_prefill == pytest.approx(250 / 225)
    assert summary.spread_busy == 1.5
    assert summary.utilisation == 0.5
    assert summary.requests_per_s == 3 / 8
    assert summary.output_tokens_per_s == 43 / 8
    assert summary.gpu_s_per_1k_tokens == pytest.approx(64 / 0.043)
    assert summary.dollars_per_1m_tokens == pytest.approx(64 / 3600 * 9 / 43e-6)
    assert summary.prediction_error == pytest.approx(0.2)  # of 0.2, 1 and 0
    assert (summary.duration_s, summary.wall_s) == (8.0, 3.0)


def test_both_limits_have_to_be_met() -> None:
    assert meets(outcome(), Slo(ttft_ms=1000, tpot_ms=101)).tolist() == [True, True, False, False]
    assert meets(outcome(), Slo(ttft_ms=5000, tpot_ms=101)).tolist() == [True, True, True, False]
    assert meets(outcome(), Slo(ttft_ms=5000, tpot_ms=99)).tolist() == [False, True, False, False]
    assert meets(outcome(), Slo(ttft_ms=500, tpot_ms=101)).tolist() == [True, True, False, False]


def test_nothing_served_gives_no_figures_and_no_error() -> None:
    nothing = outcome(
        first_token_s=[NAN] * 4,
        end_s=[NAN] * 4,
        queue_s=[NAN] * 4,
        cached_tokens=[0] * 4,
        replica=[-1] * 4,
        busy_s=[0.0, 0.0],
        end_of_all_s=0.0,
    )
    summary = summarize(nothing, "p", Slo())
    assert (summary.finished, summary.refused, summary.goodput_share) == (0, 4, 0.0)
    assert math.isnan(summary.ttft_s.p50)
    assert math.isnan(summary.hit_rate)
    assert (summary.spread_requests, summary.spread_busy) == (1.0, 1.0)
    assert math.isnan(summary.dollars_per_1m_tokens)


def test_the_spread_is_the_maximum_over_the_mean() -> None:
    assert spread(np.array([1.0, 1.0, 4.0])) == 2.0
    assert spread(np.array([0.0, 0.0])) == 1.0


def test_what_a_log_measured_is_summarised_like_the_simulation() -> None:
    requests = [
        SimRequest(0.0, 10, 11, measured_ttft_s=1.0, measured_duration_s=2.0),
        SimRequest(0.0, 10, 1, measured_ttft_s=3.0, measured_duration_s=3.0),
        SimRequest(0.0, 10, 5),
    ]
    figures = measured(requests)
    assert figures is not None
    assert (figures.requests, figures.ttft_s.p50, figures.tpot_s.p50) == (2, 2.0, 0.1)
    assert measured(requests[2:]) is None
    assert math.isnan(Percentiles.of(np.array([NAN])).p50)
