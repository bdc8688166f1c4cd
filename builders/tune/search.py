"""PURE: which settings are tried next. A state machine: (state, outcome) -> state; state -> next settings, or the end.

The search climbs, one knob at a time. It begins at a conservative baseline; goes up a knob's rungs as long as that
helps, else down; then the next knob; and around again until no step helps, or the trials are used up. Every knob's
rungs are ordered by the memory that they take, which gives the rules that make a search on real GPUs bearable:

- what ran out of memory, and all that takes at least as much of everything, is never tried (again);
- a baseline that does not run is lowered in all knobs together, until something runs;
- a difference within the noise of both measurements is no difference: if there are trials left, both are measured once
  more, and then the earlier one stays;
- a larger batch is only tried if the best load filled the smaller one;
- the result is never worse, as it was measured, than the baseline.

Decisions are made again from the first trial on for every step: the trials are all the state there is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum

Point = tuple[int, ...]  # a rung of each knob

_LEAST_GAIN = 0.02  # less is not worth another setting
_ERRORS = 2.0  # standard errors that a difference has to exceed


class FailureKind(StrEnum):
    """Why a trial brought no figure."""

    OUT_OF_MEMORY = "out of memory"
    REFUSED = "refused"  # the engine does not take such settings
    CRASHED = "crashed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Measured:
    """A trial that ran.

    Attributes:
        meets: Whether there was a load at which enough requests met the goal.
        value: Tokens/s of requests that met it, at the best load; if none meets it, how near the nearest came, in
            (0, 1], so that a search that begins where nothing meets the goal knows its way. More is better.
        error: Relative standard error of it.
        filled: Whether that load filled the batch, so that a larger one might do more.
    """

    meets: bool
    value: float
    error: float = 0.0
    filled: bool = True


@dataclass(frozen=True)
class Failed:
    """A trial that did not."""

    kind: FailureKind
    reason: str


Outcome = Measured | Failed


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        rungs: Number of values of each knob, in the order in which knobs are tried; values by the memory they take.
        start: The baseline.
        is_valid: Whether the engine takes a combination at all; not tried otherwise.
        batch: Index of the knob that is the batch's size, if it is one of them.
    """

    rungs: tuple[int, ...]
    start: Point
    is_valid: Callable[[Point], bool] = field(default=lambda _: True, compare=False)
    batch: int | None = None


@dataclass(frozen=True)
class SearchState:
    """A search under way.

    Attributes:
        space: What is searched.
        max_trials: How many at most.
        repeats: Whether close calls are measured again.
        trials: What was tried, in order.
    """

    space: Space
    max_trials: int
    repeats: bool = True
    trials: tuple[tuple[Point, Outcome], ...] = ()


@dataclass(frozen=True)
class TryNext:
    """Go on with these settings."""

    point: Point


@dataclass(frozen=True)
class Finished:
    """The end.

    Attributes:
        best: The settings to take; None: none ran.
        why: Why there is no further trial.
    """

    best: Point | None
    why: str


def record(state: SearchState, point: Point, outcome: Outcome) -> SearchState:
    """Add the outcome of a trial."""
    return replace(state, trials=(*state.trials, (point, outcome)))


def decide(state: SearchState) -> TryNext | Finished:
    """Return what to do next."""
    climb = _Climb(state)
    try:
        climb.run()
    except _NotMeasuredYet as need:
        if len(state.trials) < state.max_trials:
            return TryNext(need.point)
        return Finished(climb.best(), f"max_trials={state.max_trials} are used up")
    return Finished(climb.best(), "no step helps any more" if climb.best() is not None else "nothing runs")


def conclude(state: SearchState, why: str) -> Finished:
    """End a search early."""
    climb = _Climb(state)
    with suppress(_NotMeasuredYet):
        climb.run()
    return Finished(climb.best(), why)


def combine(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of several measurements of the same settings.

    Settings that failed once have failed, and those that missed the goal once miss it.
    """
    measured = [outcome for outcome in outcomes if isinstance(outcome, Measured)]
    if len(measured) < len(outcomes):
        return next(outcome for outcome in outcomes if isinstance(outcome, Failed))
    count, meets = len(measured), all(outcome.meets for outcome in measured)
    values = [outcome.value if outcome.meets is meets else 1.0 for outcome in measured]
    return Measured(
        meets=meets,
        value=sum(values) / count,
        error=math.sqrt(sum(outcome.error**2 for outcome in measured)) / count,
        filled=measured[0].filled,
    )


class _NotMeasuredYet(Exception):
    """The search cannot go on without this trial."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.point = point


class _Climb:
    """The search from its beginning, with what was measured; it stops where a measurement is missing."""

    def __init__(self, state: SearchState) -> None:
        self._state, self._space = state, state.space
        self._outcomes: dict[Point, list[Outcome]] = {}
        for point, outcome in state.trials:
            self._outcomes.setdefault(point, []).append(outcome)
        self._too_large = [
            point
            for point, outcome in state.trials
            if isinstance(outcome, Failed) and outcome.kind is FailureKind.OUT_OF_MEMORY
        ]
        self._base: Point | None = None
        self._incumbent: Point | None = None

    def best(self) -> Point | None:
        """Return the best point so far; the baseline, if repeated measurements show that it was better after all."""
        if self._base is None or self._incumbent is None:
            return None
        base, incumbent = self._known(self._base), self._known(self._incumbent)
        return self._base if _rank(base) > _rank(incumbent) else self._incumbent

    def run(self) -> None:
        self._base = self._incumbent = self._find_base()
        while self._incumbent is not None and self._pass():
            pass

    def _find_base(self) -> Point | None:
        point = self._space.start
        while not self._runs(point):
            lower = tuple(max(0, rung - 1) for rung in point)
            if lower == point:
                return None
            point = lower
        return point

    def _runs(self, point: Point) -> bool:
        if self._is_too_large(point) or not self._space.is_valid(point):
            return False
        return isinstance(self._measure(point), Measured)

    def _pass(self) -> bool:
        """Try every knob once; returns whether anything helped."""
        before = self._incumbent
        for knob in range(len(self._space.rungs)):
            if not self._climb_knob(knob, +1):
                self._climb_knob(knob, -1)
        return self._incumbent != before

    def _climb_knob(self, knob: int, step: int) -> bool:
        moved = False
        while (point := self._neighbour(knob, step)) is not None and self._is_better(point):
            self._incumbent, moved = point, True
        return moved

    def _neighbour(self, knob: int, step: int) -> Point | None:
        """Return the next point worth trying in a direction; None: there is none."""
        assert self._incumbent is not None, "a pass begins with one"
        if knob == self._space.batch:
            outcome = self._known(self._incumbent)
            if not (isinstance(outcome, Measured) and outcome.filled) or step < 0:
                return None  # the load test looks for the best concurrency below the batch's size itself
        for point in self._beyond(self._incumbent, knob, step):
            if self._is_too_large(point):
                return None
            if self._space.is_valid(point):
                return point
        return None

    def _beyond(self, point: Point, knob: int, step: int) -> Iterator[Point]:
        rung = point[knob] + step
        while 0 <= rung < self._space.rungs[knob]:
            yield (*point[:knob], rung, *point[knob + 1 :])
            rung += step

    def _is_too_large(self, point: Point) -> bool:
        return any(all(a >= b for a, b in zip(point, failed, strict=True)) for failed in self._too_large)

    def _is_better(self, point: Point) -> bool:
        """Compare a point with the incumbent; measures both again if that is a close call."""
        assert self._incumbent is not None, "a pass begins with one"
        challenger, holder = self._measure(point), self._measure(self._incumbent)
        if self._is_close(challenger, holder) and self._state.repeats:
            challenger, holder = self._measure(point, 2), self._measure(self._incumbent, 2)
        if not isinstance(challenger, Measured) or not isinstance(holder, Measured):
            return isinstance(challenger, Measured)
        if challenger.meets != holder.meets:
            return challenger.meets
        return challenger.value - holder.value > _threshold(challenger, holder)

    def _is_close(self, challenger: Outcome, holder: Outcome) -> bool:
        """Whether the challenger seems better, but that may be chance."""
        if not isinstance(challenger, Measured) or not isinstance(holder, Measured):
            return False
        gain = challenger.value - holder.value
        return challenger.meets == holder.meets and 0 < gain <= _threshold(challenger, holder) and gain > _least(holder)

    def _measure(self, point: Point, times: int = 1) -> Outcome:
        if len(self._outcomes.get(point, ())) < times:
            raise _NotMeasuredYet(point)
        return self._known(point)

    def _known(self, point: Point) -> Outcome:
        return combine(self._outcomes[point])


def _rank(outcome: Outcome) -> tuple[bool, bool, float]:
    if isinstance(outcome, Failed):
        return (False, False, 0.0)
    return (True, outcome.meets, outcome.value)


def _least(holder: Measured) -> float:
    return _LEAST_GAIN * holder.value


def _threshold(challenger: Measured, holder: Measured) -> float:
    error = math.hypot(challenger.error * challenger.value, holder.error * holder.value)
    return max(_least(holder), _ERRORS * error)
