"""The queueing model: what is exact, what is monotone, and how near a simulation is."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.plan.evaluate import latency_of
from builders.plan.goal import Goal
from builders.plan.load import GATEWAY_S, Limits, Load, gamma_percentile
from serve.engines.simulated.latency import StepShape
from tests.unit.builders.plan.requests import candidate, request

LIMITS = Limits(sequences=256, step_tokens=8192)


def load(model: str = "llama-3.1-8b", limits: Limits = LIMITS, of: dict[str, Any] | None = None, **goal: Any) -> Load:
    asked = request(model, **goal)
    return Load(latency_of(asked, candidate(**(of or {}))), asked.goal, limits)


def test_one_request_alone_takes_its_prompt_and_its_steps() -> None:
    goal = Goal(input_tokens=1000, output_tokens=201, length_deviation=0.0)
    latency = latency_of(request(), candidate())
    idle = Load(latency, goal, LIMITS).idle
    prompt_s = latency.step_s(StepShape(1000, 1000 * 1001 / 2, 1))
    assert idle.ttft_mean_s == pytest.approx(GATEWAY_S + prompt_s)
    assert idle.ttft_s == pytest.approx(idle.ttft_mean_s)
    assert idle.tpot_mean_s == pytest.approx(latency.step_s(StepShape(0, 0.0, 0, 1, 1100)), rel=1e-3)


@given(st.floats(0.1, 255))
def test_littles_law_holds(batch: float) -> None:
    state = load(input_tokens=1000, output_tokens=200).state(batch)
    assert state.batch == pytest.approx(state.rate_per_s * 199 * state.step_s)
    assert state.step_s == pytest.approx(state.decode_s / (1.0 - state.prefill_share))
    assert 0.0 < state.prefill_share < 1.0


@given(st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v2-lite"]), st.floats(1.0, 200.0))
def test_more_load_is_never_faster(model: str, batch: float) -> None:
    engine = load(model, input_tokens=500, output_tokens=100)
    calm, busy = engine.state(batch), engine.state(batch * 1.2)
    assert busy.rate_per_s > calm.rate_per_s
    assert busy.tpot_mean_s >= calm.tpot_mean_s
    assert busy.ttft_mean_s >= calm.ttft_mean_s * 0.999
    assert busy.tpot_s >= busy.tpot_mean_s


@given(st.floats(0.01, 0.99))
def test_a_rate_leads_to_its_state(share: float) -> None:
    engine = load(input_tokens=1000, output_tokens=200)
    rate = engine.saturated.rate_per_s * share
    assert engine.at(rate).rate_per_s == pytest.approx(rate, rel=1e-3)


def test_limits_are_met_and_used() -> None:
    engine = load(input_tokens=1000, output_tokens=200)
    most = engine.most(0.15, 0.02)
    assert most is not None
    assert most.ttft_s <= 0.15
    assert most.tpot_s <= 0.02
    slack = engine.state(most.batch * 1.01)
    assert slack.ttft_s > 0.15 or slack.tpot_s > 0.02
    assert engine.most(0.001, None) is None
    assert engine.most(None, 0.0001) is None


def test_stricter_percentiles_and_limits_carry_less() -> None:
    def carried(tpot_s: float, **goal: Any) -> float:
        most = load(input_tokens=1000, output_tokens=200, **goal).most(0.5, tpot_s)
        assert most is not None
        return most.rate_per_s

    assert carried(0.02, percentile=99) < carried(0.02, percentile=95) < carried(0.02, percentile=50)
    assert carried(0.01) < carried(0.02) < carried(0.03)
    assert carried(0.02, cached_share=0.5) > carried(0.02)


def test_the_batch_is_bounded_by_memory_and_by_the_tokens_of_a_step() -> None:
    assert load(limits=Limits(7, 8192)).largest_batch == 7
    few = load(limits=Limits(10_000, 1024), input_tokens=1000, output_tokens=101)
    assert few.largest_batch == pytest.approx(1024 / 11)  # 10 prompt tokens and one output token a sequence and step
    assert load(limits=Limits(0, 8192)).most(None, None) is None


def test_long_prompts_wait_for_several_steps() -> None:
    small = load(limits=Limits(64, 1024), input_tokens=8000, output_tokens=200).state(8)
    large = load(limits=Limits(64, 8192), input_tokens=8000, output_tokens=200).state(8)
    assert small.ttft_mean_s > large.ttft_mean_s


def test_a_prompt_passes_the_stages_one_after_the_other() -> None:
    whole = load("llama-3.3-70b", of={"tensor": 2}, input_tokens=4000).idle
    staged = load("llama-3.3-70b", of={"tensor": 2, "pipeline": 2}, input_tokens=4000).idle
    assert staged.ttft_mean_s > 0.9 * whole.ttft_mean_s  # twice the GPUs, hardly sooner
    cut = load("llama-3.3-70b", of={"tensor": 4}, input_tokens=4000).idle
    assert cut.ttft_mean_s < 0.7 * whole.ttft_mean_s


@pytest.mark.parametrize(
    ("mean", "variance", "z", "percentile"),
    [
        (1.0, 1.0, 1.6449, 2.9957),  # exponential: -ln 0.05
        (1.0, 1.0, 0.0, 0.6931),  # -ln 0.5
        (4.0, 4.0, 1.6449, 7.7537),  # of shape 4
        (5.0, 0.0, 1.6449, 5.0),
    ],
)
def test_percentiles_of_the_gamma_distribution(mean: float, variance: float, z: float, percentile: float) -> None:
    assert gamma_percentile(mean, variance, z) == pytest.approx(percentile, rel=0.02)


@given(st.floats(0.01, 10), st.floats(0.0, 10), st.floats(0, 3))
def test_percentiles_are_finite_and_grow(mean: float, variance: float, z: float) -> None:
    found = gamma_percentile(mean, variance, z)
    assert math.isfinite(found)
    assert gamma_percentile(mean, variance, z + 0.1) >= found
