"""Skipping ahead in virtual time brings what stepping through it brings."""

import math

import pytest
from hypothesis import given, settings

from serve.core.kv_events import KvStored
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import ScheduledSequence
from serve.engines.simulated.timeline import Timeline
from tests.unit.engines.simulated.workload import SIZE, Arrival, CheckedLatency, arrivals, limits, make_sequence

Outcome = list[tuple[float, float, float, int, int]]


class OneByOne(Timeline[ScheduledSequence]):
    """A timeline that never takes steps together: what the real one has to agree with."""

    def _begin(self, now_s: float) -> None:
        super()._begin(now_s)
        if self._run is not None:
            self._end_s = now_s + self._run.first_s
            self._run = None


def play(timeline: Timeline[ScheduledSequence], workload: list[Arrival]) -> tuple[Outcome, set[int]]:
    scheduler = timeline.scheduler
    sequences = [make_sequence(arrival, serial) for serial, arrival in enumerate(workload)]
    events = [(arrival.at_s, 0, serial) for serial, arrival in enumerate(workload)]
    events += [(a.cancel_s, 1, serial) for serial, a in enumerate(workload) if a.cancel_s is not None]
    content: set[int] = set()

    def advance(until_s: float) -> None:
        for progress in timeline.advance(until_s):
            assert progress.at_s <= until_s
            for event in progress.events:
                if isinstance(event, KvStored):
                    content.update(event.block_hashes)
                else:
                    content.difference_update(event.block_hashes)

    for at_s, kind, serial in sorted(events):
        advance(at_s)
        assert timeline.next_s > at_s
        if kind:
            timeline.cancel(sequences[serial], at_s)
        elif scheduler.limits.fits(workload[serial].prompt_tokens, workload[serial].max_tokens):
            timeline.submit(sequences[serial], at_s)
    while timeline.next_s < math.inf:
        advance(timeline.next_s)
    assert content == scheduler.pool.content()
    outcome = [(s.started_s, s.first_token_s, s.finished_s, s.cached_tokens, s.produced_tokens) for s in sequences]
    return outcome, content


@settings(max_examples=250, deadline=None)
@given(workload=arrivals, scheduler_limits=limits)
def test_runs_of_steps_are_the_same_as_single_steps(workload: list[Arrival], scheduler_limits: SchedulerLimits) -> None:
    fast, slow = (
        kind(Scheduler(scheduler_limits, CheckedLatency())) for kind in (Timeline[ScheduledSequence], OneByOne)
    )
    fast_outcome, fast_content = play(fast, workload)
    slow_outcome, slow_content = play(slow, workload)
    for one, other in zip(fast_outcome, slow_outcome, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert fast_content == slow_content
    assert fast.steps == slow.steps
    assert fast.busy_s == pytest.approx(slow.busy_s, rel=1e-9)


def test_a_long_output_costs_a_few_calls() -> None:
    latency = CheckedLatency()
    scheduler: Scheduler[ScheduledSequence] = Scheduler(
        SchedulerLimits(total_blocks=1000, tokens_per_block=SIZE), latency
    )
    timeline = Timeline(scheduler)
    sequence = make_sequence(Arrival(0, 10, 3000, 3000, 0.0, None), 0)
    timeline.submit(sequence, 5.0)
    assert len(timeline.advance(math.inf)) == 2
    assert timeline.steps == 3000
    assert timeline.busy_s == pytest.approx(sequence.finished_s - 5.0)
    assert len(latency.shapes) < 10
    assert sequence.finished_s > sequence.first_token_s > 5.0
