"""The search on made-up response surfaces: what it finds, and what it never does."""

import math
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.tune.search import (
    Failed,
    FailureKind,
    Finished,
    Measured,
    Outcome,
    Point,
    SearchState,
    Space,
    TryNext,
    combine,
    conclude,
    decide,
    record,
)

Surface = Callable[[Point], Outcome]
OUT_OF_MEMORY = Failed(FailureKind.OUT_OF_MEMORY, "CUDA out of memory")


def search(
    space: Space, surface: Surface, max_trials: int = 100, *, repeats: bool = True
) -> tuple[Finished, SearchState]:
    state = SearchState(space, max_trials, repeats)
    while isinstance(step := decide(state), TryNext):
        state = record(state, step.point, surface(step.point))
    return step, state


def peak(best: Point, rungs: tuple[int, ...]) -> Surface:
    """Return a surface with one top, that falls by a tenth a step away from it."""
    return lambda point: Measured(True, 1000.0 * 0.9 ** sum(abs(a - b) for a, b in zip(point, best, strict=True)))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    rungs = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    return Space(rungs, tuple(draw(st.integers(0, count - 1)) for count in rungs))


@st.composite
def surfaces(draw: st.DrawFn) -> tuple[Space, Surface]:
    """Draw any surface: rough, noisy, with failures, and with memory that runs out above some level."""
    space, seed = draw(spaces()), draw(st.integers(0, 2**32 - 1))
    noise, failing, room = draw(st.floats(0, 0.3)), draw(st.floats(0, 0.5)), draw(st.floats(0, 1.5))
    rng = random.Random(seed)

    def surface(point: Point) -> Outcome:
        fixed = random.Random(f"{seed}{point}")
        if sum(point) > room * sum(count - 1 for count in space.rungs):
            return OUT_OF_MEMORY
        if fixed.random() < failing:
            return Failed(fixed.choice([FailureKind.CRASHED, FailureKind.TIMED_OUT]), "it failed")
        value = max(0.0, fixed.uniform(0, 1000) * (1 + noise * rng.gauss(0, 1)))
        meets = fixed.random() < 0.7
        return Measured(meets, value if meets else value / 4000, noise, fixed.random() < 0.5)

    return space, surface


def of(state: SearchState, point: Point) -> Outcome:
    return combine([outcome for tried, outcome in state.trials if tried == point])


@given(surfaces(), st.integers(1, 30), st.booleans())
def test_whatever_the_surface_its_bounds_hold(drawn: tuple[Space, Surface], max_trials: int, repeats: bool) -> None:
    space, surface = drawn
    finished, state = search(space, surface, max_trials, repeats=repeats)
    points = [point for point, _ in state.trials]
    assert len(points) <= max_trials
    assert max((points.count(point) for point in points), default=0) <= (2 if repeats else 1)
    assert all(0 <= rung < count for point in points for rung, count in zip(point, space.rungs, strict=True))
    ran = [point for point in points if isinstance(of(state, point), Measured)]
    assert finished.best in ran if ran else finished.best is None


@given(surfaces(), st.integers(1, 30))
def test_what_ran_out_of_memory_and_all_above_it_is_never_tried_again(
    drawn: tuple[Space, Surface], max_trials: int
) -> None:
    _, state = search(*drawn, max_trials)
    too_large: list[Point] = []
    for point, outcome in state.trials:
        assert not any(all(a >= b for a, b in zip(point, failed, strict=True)) for failed in too_large)
        if outcome == OUT_OF_MEMORY:
            too_large.append(point)


@given(surfaces(), st.integers(1, 30), st.booleans())
def test_result_was_never_measured_worse_than_the_first_that_ran(
    drawn: tuple[Space, Surface], max_trials: int, repeats: bool
) -> None:
    finished, state = search(*drawn, max_trials, repeats=repeats)
    if finished.best is None:
        return
    best = of(state, finished.best)
    assert isinstance(best, Measured)
    first = next(point for point, _ in state.trials if isinstance(of(state, point), Measured))
    base = of(state, first)
    assert isinstance(base, Measured)
    assert (best.meets, best.value) >= (base.meets, base.value)


@given(surfaces(), st.integers(1, 20))
def test_decisions_are_the_same_when_they_are_made_again(drawn: tuple[Space, Surface], max_trials: int) -> None:
    finished, state = search(*drawn, max_trials)
    replayed = SearchState(state.space, max_trials)
    for point, outcome in state.trials:
        assert decide(replayed) == TryNext(point)
        replayed = record(replayed, point, outcome)
    assert decide(replayed) == finished


@given(spaces(), st.data())
def test_top_of_a_surface_with_one_is_found(space: Space, data: st.DataObject) -> None:
    top = tuple(data.draw(st.integers(0, count - 1)) for count in space.rungs)
    finished, state = search(space, peak(top, space.rungs))
    assert finished.best == top
    # Beside the way there, a look to either side of each knob, twice around.
    way = sum(abs(a - b) for a, b in zip(space.start, top, strict=True))
    assert len(state.trials) <= 1 + way + 4 * len(space.rungs)


def test_first_trial_is_the_baseline() -> None:
    assert decide(SearchState(Space((5, 5), (2, 1)), 10)) == TryNext((2, 1))


def test_a_baseline_that_does_not_run_is_lowered_until_something_does() -> None:
    finished, state = search(
        Space((5, 5), (4, 3)), lambda point: OUT_OF_MEMORY if sum(point) > 3 else Measured(True, 100.0 + sum(point))
    )
    assert [point for point, _ in state.trials][:3] == [(4, 3), (3, 2), (2, 1)]
    assert finished.best is not None
    assert sum(finished.best) <= 3


def test_nothing_that_runs_is_an_answer() -> None:
    finished, state = search(Space((3, 3), (1, 2)), lambda _: OUT_OF_MEMORY)
    assert finished == Finished(None, "nothing runs")
    assert [point for point, _ in state.trials] == [(1, 2), (0, 1), (0, 0)]


def test_a_baseline_without_knobs_is_one_trial() -> None:
    finished, state = search(Space((), ()), lambda _: Measured(True, 5.0))
    assert (finished.best, len(state.trials)) == ((), 1)


def test_what_meets_the_goal_beats_whatever_does_not() -> None:
    values: dict[Point, Outcome] = {
        (0,): Measured(True, 10.0),
        (1,): Measured(False, 0.99),
        (2,): Measured(True, 2000.0),
    }
    finished, _ = search(Space((3,), (0,)), lambda point: values[point])
    assert finished.best == (0,)
    finished, _ = search(Space((2,), (1,)), lambda point: values[point])
    assert finished.best == (0,)


def test_a_gain_within_the_noise_is_measured_again_and_the_earlier_stays() -> None:
    values: dict[Point, Iterator[float]] = {(0,): iter([100.0, 104.0]), (1,): iter([106.0, 103.0])}
    finished, state = search(Space((2,), (0,)), lambda point: Measured(True, next(values[point]), error=0.05))
    assert [point for point, _ in state.trials] == [(0,), (1,), (1,), (0,)]
    assert finished.best == (0,)


def test_a_gain_that_the_second_measurement_confirms_is_taken() -> None:
    values: dict[Point, Iterator[float]] = {(0,): iter([100.0, 100.0]), (1,): iter([106.0, 112.0])}
    finished, _ = search(Space((2,), (0,)), lambda point: Measured(True, next(values[point]), error=0.04))
    assert finished.best == (1,)


def test_a_gain_of_a_percent_is_not_worth_another_setting() -> None:
    finished, state = search(Space((2,), (0,)), lambda point: Measured(True, 100.0 + point[0]))
    assert (finished.best, len(state.trials)) == ((0,), 2)


def test_a_quick_search_repeats_nothing() -> None:
    finished, state = search(
        Space((2,), (0,)), lambda point: Measured(True, 100.0 + 6 * point[0], error=0.05), repeats=False
    )
    assert (finished.best, len(state.trials)) == ((0,), 2)


def test_a_larger_batch_is_only_tried_once_the_smaller_is_full() -> None:
    space = Space((4, 2), (1, 0), batch=0)
    _, state = search(space, lambda _: Measured(True, 100.0, filled=False))
    assert {point[0] for point, _ in state.trials} == {1}
    _, state = search(space, lambda _: Measured(True, 100.0, filled=True))
    assert {point[0] for point, _ in state.trials} == {1, 2}


def test_combinations_that_the_engine_refuses_are_passed_over() -> None:
    space = Space((5,), (0,), is_valid=lambda point: point[0] != 1)
    finished, state = search(space, peak((4,), (5,)))
    assert finished.best == (4,)
    assert (1,) not in [point for point, _ in state.trials]


def test_a_search_whose_time_is_over_takes_the_best_so_far() -> None:
    state = SearchState(Space((5,), (0,)), 100)
    for rung in range(3):
        state = record(state, (rung,), Measured(True, 100.0 * (rung + 1)))
    assert conclude(state, "time is over") == Finished((2,), "time is over")
    assert conclude(SearchState(Space((5,), (0,)), 100), "at once").best is None


@pytest.mark.parametrize("outcomes", [[Measured(True, 10.0, 0.1), Measured(False, 0.3, 0.1)]])
def test_measurements_of_the_same_settings_are_averaged(outcomes: list[Outcome]) -> None:
    found = combine(outcomes)
    assert isinstance(found, Measured)
    assert (found.meets, found.value) == (False, 0.65)
    assert found.error == pytest.approx(0.1 / math.sqrt(2))
    assert combine([*outcomes, OUT_OF_MEMORY]) == OUT_OF_MEMORY
