"""Load tests: what is offered, how it climbs, and the figures of what came back."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.evaluate.ladder import Ladder, next_concurrency
from builders.evaluate.load_point import Goal, LoadTrace, best_point, summarize
from builders.evaluate.load_shape import LoadShape, LoadSource
from builders.evaluate.load_test import LoadPlan, load_test
from serve.artifacts.certificates import LoadPoint
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.errors import ConfigError, EngineDead, Overloaded
from tests.unit.builders.evaluate.bigram_engine import BigramEngine

GOAL = Goal(ttft_s=1.0, tpot_s=0.1, percentile=95.0)
RING = list(range(10, 90))


def point(concurrency: int, goodput: float, within: float = 1.0) -> LoadPoint:
    return LoadPoint(
        concurrency=concurrency,
        requests=10,
        seconds=1.0,
        output_tokens_per_s=goodput,
        goodput_tokens_per_s=goodput,
        ttft_p50_s=0.1,
        ttft_p95_s=0.1,
        tpot_p50_s=0.01,
        tpot_p95_s=0.01,
        within_limits=within,
    )


# Shape


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10**6))
def test_requests_are_of_about_the_mean_length_and_fit(prompt: int, output: int, seed: int) -> None:
    room = prompt + output
    source = LoadSource(LoadShape(prompt, output), RING, room, seed)
    for _ in range(20):
        request = source.draw()
        assert 1 <= len(request.prompt) <= 1.5 * prompt + 1
        assert 1 <= request.output_tokens <= max(1, 1.5 * output)
        assert len(request.prompt) + request.output_tokens <= room


def test_same_seed_draws_the_same_requests_and_prompts_are_parts_of_the_texts() -> None:
    first, second = (LoadSource(LoadShape(100, 10), RING, 1000, 7) for _ in range(2))
    requests = [first.draw() for _ in range(50)]
    assert requests == [second.draw() for _ in range(50)]
    assert 90 < np.mean([len(request.prompt) for request in requests]) < 110
    assert all((b - a) % len(RING) == 1 for r in requests for a, b in zip(r.prompt, r.prompt[1:], strict=False))


def test_load_that_does_not_fit_names_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"tune\.prompt_tokens=100 and tune\.output_tokens=10 do not fit 109"):
        LoadSource(LoadShape(100, 10), RING, 109, 0)


# Ladder


def climb(curve: Sequence[float], ladder: Ladder, limit: int) -> list[int]:
    """Climb where goodput follows a curve, and more than `limit` streams miss the goal."""
    points: list[LoadPoint] = []
    while (concurrency := next_concurrency(points, ladder, GOAL)) is not None:
        goodput = float(np.interp(concurrency, range(len(curve)), curve))
        points.append(point(concurrency, goodput, 1.0 if concurrency <= limit else 0.5))
    return [p.concurrency for p in points]


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(2, 4),
    st.integers(1, 12),
    st.integers(0, 300),
    st.integers(0, 2**32 - 1),
)
def test_climbing_ends_repeats_nothing_and_stays_in_its_bounds(
    first: int, most: int, factor: int, max_points: int, limit: int, seed: int
) -> None:
    curve = np.random.default_rng(seed).uniform(0, 1000, 301).tolist()
    offered = climb(curve, Ladder(first, most, factor, max_points), limit)
    assert 1 <= len(offered) <= max_points
    assert len(set(offered)) == len(offered)
    assert all(1 <= concurrency <= max(most, 1) for concurrency in offered)


def test_climbing_halves_the_gap_where_the_goal_is_missed() -> None:
    rising = [float(n) for n in range(301)]
    assert climb(rising, Ladder(1, 256, 4, 10), limit=40) == [1, 4, 16, 64, 32, 45]
    assert climb(rising, Ladder(1, 256, 4, 10), limit=1000) == [1, 4, 16, 64, 256]


def test_climbing_stops_where_more_streams_bring_no_more() -> None:
    flat = [min(float(n), 10.0) for n in range(301)]
    assert climb(flat, Ladder(4, 256, 2, 10), limit=1000) == [4, 8, 16, 32, 64]


def test_one_hiccup_does_not_end_the_climb() -> None:
    rising = [0.0 if n == 2 else float(n) for n in range(301)]
    assert climb(rising, Ladder(1, 8, 2, 10), limit=1000) == [1, 2, 4, 8]


def test_a_first_load_that_is_too_much_is_lowered() -> None:
    assert climb([1.0] * 301, Ladder(64, 256, 2, 10), limit=10) == [64, 32, 16, 8, 11]
    assert climb([1.0] * 301, Ladder(2, 256, 2, 10), limit=0) == [2, 1]


# Figures


def trace(start: float, tokens: Sequence[float], *, finished: bool = True) -> LoadTrace:
    return LoadTrace(start, tuple((time, 1) for time in tokens), tokens[-1] if tokens else start + 5.0, finished)


def test_figures_count_tokens_of_the_window_and_requests_that_began_in_it() -> None:
    traces = [
        trace(0.0, [0.5, 0.9, 1.1]),  # began in the ramp: its tokens count from second 1 on
        trace(1.0, [1.2, 1.25, 1.3]),
        trace(1.5, [3.0, 3.05]),  # late
        trace(2.0, [2.1, 2.15, 9.0]),  # its end is after the window, and slow
        trace(2.5, [], finished=False),
    ]
    found = summarize(traces, 1.0, 5.0, 2, GOAL)
    assert (found.requests, found.failed, found.seconds) == (4, 1, 4.0)
    assert found.output_tokens_per_s == pytest.approx((1 + 3 + 2 + 2) / 4.0)
    # Half of a second is too slow for a token, and more than one is too late for the first.
    assert found.within_limits == 0.25
    assert found.goodput_tokens_per_s == pytest.approx(3 / 4.0)
    assert found.ttft_p50_s == pytest.approx(np.percentile([0.2, 1.5, 0.1, 5.0], 50))


def test_a_short_test_judges_the_requests_of_the_ramp_too() -> None:
    found = summarize([trace(0.0, [0.5, 0.55]), trace(0.1, [0.6, 0.65])], 0.4, 1.0, 2, GOAL)
    assert (found.requests, found.within_limits) == (2, 1.0)


def test_best_point_has_met_the_goal_if_any_has() -> None:
    points = [point(1, 10.0), point(2, 20.0), point(4, 90.0, 0.5)]
    assert best_point(points, GOAL).concurrency == 2
    late = point(8, 90.0, 0.2).model_copy(update={"ttft_p95_s": 4.0, "tpot_p95_s": 0.05})
    slow = point(4, 0.0, 0.0).model_copy(update={"tpot_p95_s": 0.2})
    assert [GOAL.nearness(one) for one in (late, slow)] == [0.25, 0.5]
    assert best_point([late, slow], GOAL).concurrency == 4


# The test itself


@given(st.floats(0, 1e4), st.floats(0.01, 100))
def test_slow_requests_are_measured_longer_within_reason(request_s: float, point_s: float) -> None:
    window_s = LoadPlan(LoadShape(1, 1), GOAL, Ladder(1, 1), point_s, 0).window_s(request_s)
    assert point_s <= window_s <= 3 * point_s
    assert window_s >= min(2 * request_s, 3 * point_s)


def plan(goal: Goal = GOAL, **ladder: int) -> LoadPlan:
    return LoadPlan(LoadShape(32, 8), goal, Ladder(**{"first": 2, "most": 4, **ladder}), point_s=0.05, seed=0)


async def test_load_test_of_an_engine() -> None:
    latency = FixedLatencySettings(decode_step_s=0.001)
    engine = SimulatedEngine(SimulatedSettings(latency=latency, vocab_size=100, token_range=(0, 99)))
    await engine.start()
    told: list[int] = []
    points = await load_test(engine, plan(), RING, lambda points: told.append(len(points)))
    await engine.stop()
    assert points[0].concurrency == 2
    assert told == list(range(1, len(points) + 1))
    assert all(p.requests >= p.concurrency and p.failed == 0 for p in points)


async def test_no_request_shares_the_cache_of_another() -> None:
    salts: list[str] = []

    class Salts(BigramEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
            salts.append(request.cache_salt)
            async for delta in super().generate(request):
                yield delta

    await load_test(Salts(np.zeros((100, 100))), plan(most=2), RING)
    assert len(set(salts)) == len(salts)
    assert "" not in salts


async def test_requests_that_a_full_engine_refuses_have_failed() -> None:
    class Full(BigramEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
            if request.prompt_tokens:
                raise Overloaded("full", retry_after_s=0.01)
            yield TokenDelta()

    (found,) = await load_test(Full(np.zeros((100, 100))), plan(first=1, most=1), RING)
    assert found.failed == found.requests
    assert (found.within_limits, found.goodput_tokens_per_s) == (0.0, 0.0)


async def test_requests_that_do_not_end_are_given_up() -> None:
    class Stuck(BigramEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
            if self.requests >= 2:  # after the warm-up
                await asyncio.Event().wait()
            async for delta in super().generate(request):
                yield delta

    soon = Goal(ttft_s=0.05, tpot_s=0.001, percentile=95.0)  # nobody waits for what has missed it already
    (found,) = await load_test(Stuck(np.zeros((100, 100))), plan(soon, first=1, most=1), RING)
    assert (found.requests, found.failed) == (1, 1)


async def test_an_engine_that_runs_out_of_memory_ends_the_test() -> None:
    class Small(BigramEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
            if request.prompt_tokens:
                raise Overloaded("the engine ran out of memory; try again", retry_after_s=0.01)
            yield TokenDelta()

    with pytest.raises(Overloaded, match="out of memory"):
        await load_test(Small(np.zeros((100, 100))), plan(), RING)


async def test_the_death_of_an_engine_ends_the_test() -> None:
    with pytest.raises(EngineDead, match="it died"):
        await load_test(BigramEngine(np.zeros((100, 100)), dies_after=5), plan(), RING)
