"""Runs of decode steps have the duration that their steps have one by one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engines.simulated.latency import DecodeRun, FixedLatency, StepShape, decode_run

runs = st.builds(
    DecodeRun,
    steps=st.integers(1, 400),
    first_s=st.floats(1e-6, 0.1),
    slope_s=st.one_of(st.just(0.0), st.floats(0, 1e-4), st.floats(0, 1e-18)),
)


class Affine:
    """A step costs a constant, and something for each sequence and each token of context."""

    def step_s(self, shape: StepShape) -> float:
        return 1e-3 + 1e-5 * shape.decode_sequences + 1e-8 * shape.decode_context_tokens


@given(run=runs)
def test_a_runs_duration_is_the_sum_of_its_steps(run: DecodeRun) -> None:
    steps = [run.first_s + i * run.slope_s for i in range(run.steps)]
    assert run.duration_s(run.steps) == pytest.approx(math.fsum(steps))


@given(run=runs, share=st.floats(0, 1.2))
def test_steps_within_a_budget_are_as_many_as_fit(run: DecodeRun, share: float) -> None:
    budget_s = share * run.duration_s(run.steps)
    steps = run.steps_within(budget_s)
    assert 0 <= steps <= run.steps
    assert run.duration_s(steps) <= budget_s
    assert steps == run.steps or run.duration_s(steps + 1) > budget_s


def test_steps_that_take_no_time_all_fit() -> None:
    assert DecodeRun(5, 0.0, 0.0).steps_within(0.0) == 5


@given(sequences=st.integers(1, 100), context=st.integers(1, 10**6), steps=st.integers(1, 200))
def test_a_run_follows_an_affine_model_exactly(sequences: int, context: int, steps: int) -> None:
    run = decode_run(Affine(), sequences, context, steps)
    durations = [
        Affine().step_s(StepShape(decode_sequences=sequences, decode_context_tokens=context + i * sequences))
        for i in range(steps)
    ]
    assert run.duration_s(steps) == pytest.approx(math.fsum(durations))


def test_fixed_rates_add_up() -> None:
    latency = FixedLatency(prefill_tokens_per_s=1000, decode_step_s=0.01, overhead_s=0.001)
    assert latency.step_s(StepShape(decode_sequences=32)) == pytest.approx(0.011)
    assert latency.step_s(StepShape(prefill_tokens=100)) == pytest.approx(0.101)
    assert latency.step_s(StepShape(prefill_tokens=100, decode_sequences=1)) == pytest.approx(0.111)
    assert FixedLatency(math.inf, 0.0).step_s(StepShape(prefill_tokens=10**6, decode_sequences=9)) == 0.0
