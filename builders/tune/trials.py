"""Trials of one search: each engine in processes of its own, and its result as a record."""

import asyncio
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.evaluate.engines import EnginePlace
from builders.evaluate.load_point import best_point
from builders.evaluate.performance import goal_of, load_plan
from builders.settings.tune import TuneSettings
from builders.tune.search import FailureKind
from builders.tune.trial import TrialOrder, TrialResult
from builders.tune.trial_process import run_trial
from builders.tune.trial_runner import TrialRunner, trial_limit_s, write_ring
from builders.tune.tuning_record import TrialRecord
from serve.engines.factory import AnyEngineSettings
from serve.engines.trtllm.settings import TrtllmSettings


@dataclass(frozen=True)
class TrialSettings:
    """What one trial has of its own.

    Attributes:
        named: Values of the knobs.
        section: The engine's section.
        settings: The same, checked.
    """

    named: dict[str, Any]
    section: dict[str, Any]
    settings: AnyEngineSettings


class Trials:
    """Runs trials, one after the other.

    Args:
        place: The candidate's engine; trials change its settings.
        tune: The load.
        texts: Token ids of texts, for the prompts.
        directory: For their files.
        gpus: How many GPUs this process has.
    """

    def __init__(
        self, place: EnginePlace, tune: TuneSettings, texts: Sequence[Sequence[int]], directory: Path, gpus: int
    ) -> None:
        self._place, self._tune = place, tune
        self._ring_file = directory / "ring.json"
        self._ring = write_ring(self._ring_file, texts)
        self._runner = TrialRunner(directory, _gpus(gpus))
        self._first = 1

    def run(self, number: int, trial: TrialSettings, most_s: float = math.inf) -> tuple[TrialResult, TrialRecord]:
        """Run a trial; blocks, and raises nothing that its engine does.

        Args:
            number: Of the trial; names its files.
            trial: What it has of its own.
            most_s: What is left of the search's time; a trial that takes longer is ended.
        """
        started_s = time.monotonic()
        result = self._run(number, trial, most_s)
        record = self._record(number, trial, result, time.monotonic() - started_s)
        if record.concurrency:  # the next one's load begins where this one was best
            self._first = record.concurrency
        return result, record

    def _run(self, number: int, trial: TrialSettings, most_s: float) -> TrialResult:
        settings = trial.settings
        points = load_plan(self._tune, settings).ladder.max_points
        limit_s = min(most_s, trial_limit_s(self._tune, points, getattr(settings, "start_timeout_s", None)))
        if self._place.ranks_are_actors:
            place = EnginePlace(settings, self._place.model_dir, self._place.plan)
            return asyncio.run(self._run_here(place, limit_s))
        order = TrialOrder(
            kind=settings.kind,  # type: ignore[arg-type]  # no bundle has a simulated engine
            section={key: value for key, value in trial.section.items() if key != "kind"},
            backend=settings.backend if isinstance(settings, TrtllmSettings) else None,
            model_dir=self._place.model_dir,
            layout=self._place.plan.layout,
            launcher=self._place.plan.launcher,  # type: ignore[arg-type]  # the others' ranks are actors
            tune=self._tune.model_dump(mode="json"),
            first=self._first,
            ring=self._ring_file,
        )
        return self._runner.run(number, order, limit_s)

    async def _run_here(self, place: EnginePlace, limit_s: float) -> TrialResult:
        """Run a trial whose ranks are Ray actors: they are processes of their own already."""
        try:
            async with asyncio.timeout(limit_s):
                return await run_trial(place, self._tune, self._first, self._ring)
        except TimeoutError:
            reason = f"it was not done after {limit_s:.0f} s, and was ended"
            return TrialResult(failure=FailureKind.TIMED_OUT, reason=reason)

    def _record(self, number: int, trial: TrialSettings, result: TrialResult, seconds: float) -> TrialRecord:
        record = TrialRecord(
            number=number,
            settings=trial.named,
            failure=result.failure,
            reason=result.reason,
            points=result.points,
            start_s=result.start_s,
            seconds=seconds,
        )
        if not result.points:
            return record
        goal = goal_of(self._tune)
        best = best_point(result.points, goal)
        found = {"meets": goal.is_met(best), "goodput_tokens_per_s": best.goodput_tokens_per_s}
        return record.model_copy(update={**found, "nearness": goal.nearness(best), "concurrency": best.concurrency})


def described(record: TrialRecord) -> str:
    """Return what a trial brought, for people."""
    if record.failure is not None:
        return f"{record.failure.value}: {record.reason}"
    if not record.meets:
        return f"misses the goal: its limits are {record.nearness:.0%} of what {record.concurrency} stream(s) took"
    return f"{record.goodput_tokens_per_s:.4g} tokens/s of goodput at {record.concurrency} stream(s)"


def _gpus(count: int) -> tuple[str, ...]:
    """Return this process's GPUs as the driver names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return tuple(names[:count])
