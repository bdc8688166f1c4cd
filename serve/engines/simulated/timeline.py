"""Timeline: the scheduler in virtual time, for discrete-event simulation.

Whoever simulates keeps each engine's `next_s`, advances an engine when its turn comes, and submits to it in between.
Runs of uniform decode steps are taken as one, so an engine costs a few calls a request, however long the output.
"""

import math
from typing import Generic, NamedTuple

from serve.core.kv_events import KvRemoved, KvStored
from serve.engines.simulated.latency import DecodeRun
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import SequenceT


class Progress(NamedTuple, Generic[SequenceT]):
    """What happened at one moment.

    Attributes:
        at_s: When.
        prefilled: Sequences that got the first token after their prompt.
        finished: Sequences that got their last token.
        events: What changed in the cache.
    """

    at_s: float
    prefilled: list[SequenceT]
    finished: list[SequenceT]
    events: list[KvStored | KvRemoved]


class Timeline(Generic[SequenceT]):
    """One simulated engine in virtual time.

    Args:
        scheduler: Idle.
        start_s: Where its clock begins.

    Attributes:
        steps: How many were completed.
        busy_s: How long these took together.
    """

    def __init__(self, scheduler: Scheduler[SequenceT], start_s: float = 0.0) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self.busy_s = 0.0
        self._boundary_s = start_s  # where the present step, or the present run of steps, began
        self._end_s = math.inf  # when it ends; inf: there is none
        self._run: DecodeRun | None = None

    @property
    def next_s(self) -> float:
        """When a prompt, a sequence or a chunk ends next, if nothing is submitted before; inf: never."""
        return self._end_s

    @property
    def decode_run(self) -> tuple[float, DecodeRun] | None:
        """When the present run of uniform decode steps began, and its course; None: there is none."""
        return None if self._run is None else (self._boundary_s, self._run)

    def submit(self, sequence: SequenceT, now_s: float) -> None:
        """Let a sequence arrive. `now_s` is not before any other call's, and not after `next_s`.

        Raises:
            ValueError: It can never fit.
        """
        self.scheduler.submit(sequence, now_s)
        self._interrupt(now_s)

    def cancel(self, sequence: SequenceT, now_s: float) -> None:
        """Take a sequence out. `now_s` as for `submit`."""
        self._interrupt(now_s)
        self.scheduler.end(sequence)

    def advance(self, until_s: float) -> list[Progress[SequenceT]]:
        """Do all that is due by `until_s`, in order."""
        progress = []
        while self._end_s <= until_s and self._end_s < math.inf:
            progress.append(self._complete())
        return progress

    def _complete(self) -> Progress[SequenceT]:
        at_s, run = self._end_s, self._run
        if run is not None:
            self._skip(run.steps - 1)
        self.steps += 1
        self.busy_s += at_s - self._boundary_s
        prefilled, finished = self.scheduler.complete(at_s)
        self._begin(at_s)
        return Progress(at_s, prefilled, finished, self.scheduler.take_events())

    def _begin(self, now_s: float) -> None:
        self._boundary_s, self._run = now_s, None
        duration_s = self.scheduler.begin(now_s)
        if duration_s is None:
            self._end_s = math.inf
            return
        steps = self.scheduler.uniform_steps()
        if steps > 1:
            self._run = self.scheduler.run_of(steps)
            duration_s = self._run.duration_s(steps)
        self._end_s = now_s + duration_s

    def _interrupt(self, now_s: float) -> None:
        """Cut a run of steps short, so that the next step boundary after `now_s` is its end."""
        if self._end_s == math.inf:
            self._begin(now_s)
            return
        run = self._run
        if run is None:
            return
        done = min(run.steps_within(now_s - self._boundary_s), run.steps - 1)
        self._skip(done)
        self._run = None
        done_s = run.duration_s(done)
        self._boundary_s += done_s
        self.busy_s += done_s
        self._end_s = self._boundary_s + self.scheduler.run_of(1).first_s

    def _skip(self, steps: int) -> None:
        self.scheduler.skip(steps)
        self.steps += steps
