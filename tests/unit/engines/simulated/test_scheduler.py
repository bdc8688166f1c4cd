"""The scheduler's laws, on random workloads, after each of its steps."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.kv_events import KvRemoved, KvStored
from serve.engines.simulated.limits import SchedulerLimits
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.sequence import ScheduledSequence, SequenceState
from tests.unit.engines.simulated.workload import (
    SIZE,
    Arrival,
    CheckedLatency,
    arrivals,
    limits,
    make_sequence,
    small_chunks,
)


class Driver:
    """Steps a scheduler through arrivals and cancellations, and checks its laws after each step."""

    def __init__(self, scheduler_limits: SchedulerLimits) -> None:
        self.latency = CheckedLatency()
        self.scheduler: Scheduler[ScheduledSequence] = Scheduler(scheduler_limits, self.latency)
        self.content: set[int] = set()
        self.tokens: dict[ScheduledSequence, int] = {}

    def run(self, workload: list[Arrival]) -> list[ScheduledSequence]:
        sequences = [make_sequence(arrival, serial) for serial, arrival in enumerate(workload)]
        fitting = [
            (arrival, sequence)
            for arrival, sequence in zip(workload, sequences, strict=True)
            if self.scheduler.limits.fits(arrival.prompt_tokens, arrival.max_tokens)
        ]
        coming = sorted(fitting, key=lambda pair: pair[0].at_s)
        leaving = sorted(
            ((arrival.cancel_s, i) for i, (arrival, _) in enumerate(fitting) if arrival.cancel_s is not None),
        )
        now_s = 0.0
        while True:
            while coming and coming[0][0].at_s <= now_s:
                self.scheduler.submit(coming.pop(0)[1], now_s)
            while leaving and leaving[0][0] <= now_s:
                self.scheduler.end(fitting[leaving.pop(0)[1]][1])
            duration_s = self.scheduler.begin(now_s)
            self.check_batch()
            if duration_s is None:
                if not coming:
                    return [sequence for _, sequence in fitting]
                now_s = coming[0][0].at_s
                continue
            now_s += duration_s
            self.complete(now_s)

    def complete(self, now_s: float) -> None:
        decoding = list(self.scheduler.decoding.sequences)
        prefilled, finished = self.scheduler.complete(now_s)
        for sequence in (*decoding, *(s for s in prefilled if s.output_tokens)):
            self.tokens[sequence] = self.tokens.get(sequence, 0) + 1
        for sequence in finished:
            assert sequence.state is SequenceState.DONE
            assert self.tokens.get(sequence, 0) == sequence.produced_tokens == sequence.output_tokens
        self.check_batch()
        self.check_events()

    def check_batch(self) -> None:
        scheduler = self.scheduler
        batch = [*scheduler.prefilling, *scheduler.decoding.sequences]
        assert scheduler.running == len(batch) <= scheduler.limits.max_batch_size
        used = {h for s in batch for h in s.hashes[: s.filled_blocks]}
        assert scheduler.pool.used_blocks == len(used) + sum(s.open_blocks for s in batch)
        assert used <= scheduler.pool.content()
        for sequence in batch:
            held = sequence.filled_blocks + sequence.open_blocks
            assert held + sequence.pledged_blocks <= sequence.total_blocks(SIZE)
            if sequence in scheduler.decoding.sequences:
                assert held >= -(-scheduler.decoding.kv_tokens(sequence) // SIZE)
        queued = sum(s.prefill_tokens for s in scheduler.waiting)
        queued += sum(s.prefill_tokens - s.computed_tokens for s in scheduler.prefilling)
        assert scheduler.queued_prefill_tokens == queued
        context = sum(scheduler.decoding.kv_tokens(s) + 1 for s in scheduler.decoding.sequences)
        assert scheduler.decoding.context_tokens == context
        if scheduler.limits.guaranteed_no_evict:
            pledged = sum(s.pledged_blocks for s in batch)
            assert scheduler.pool.used_blocks + pledged <= scheduler.limits.total_blocks

    def check_events(self) -> None:
        for event in self.scheduler.take_events():
            if isinstance(event, KvStored):
                assert self.content.isdisjoint(event.block_hashes)
                self.content.update(event.block_hashes)
            else:
                assert isinstance(event, KvRemoved)
                self.content.difference_update(event.block_hashes)
        assert self.content == self.scheduler.pool.content()


@settings(max_examples=250, deadline=None)
@given(workload=arrivals, scheduler_limits=st.one_of(limits, small_chunks))
def test_laws_hold_after_each_step(workload: list[Arrival], scheduler_limits: SchedulerLimits) -> None:
    driver = Driver(scheduler_limits)
    sequences = driver.run(workload)
    scheduler = driver.scheduler
    assert all(sequence.state in (SequenceState.DONE, SequenceState.NEW) for sequence in sequences)
    assert scheduler.pool.used_blocks == scheduler.queued_prefill_tokens == scheduler.running == 0
    assert not scheduler.waiting
    for shape in driver.latency.shapes:
        assert shape.prefill_tokens + shape.decode_sequences <= scheduler_limits.max_num_tokens
    for sequence in sequences:
        if sequence.started_s >= 0:
            assert 0 <= sequence.cached_tokens < sequence.prompt_tokens
            assert sequence.cached_tokens % SIZE == 0
        if sequence.finished_s >= 0:
            assert sequence.arrived_s <= sequence.started_s < sequence.first_token_s <= sequence.finished_s
    if scheduler_limits.guaranteed_no_evict:
        assert scheduler.preemptions == 0


@settings(max_examples=100, deadline=None)
@given(workload=arrivals, scheduler_limits=limits)
def test_nobody_overtakes_without_shared_prefixes(workload: list[Arrival], scheduler_limits: SchedulerLimits) -> None:
    if scheduler_limits.share_prefixes or not scheduler_limits.guaranteed_no_evict:
        return
    sequences = Driver(scheduler_limits).run(workload)
    started = sorted((s for s in sequences if s.started_s >= 0), key=lambda s: s.serial)
    assert all(first.started_s <= second.started_s for first, second in pairwise(started))


def sequence_of(
    tokens: int, max_tokens: int, family: int = 0, serial: int = 0, output_tokens: int = 999
) -> ScheduledSequence:
    return make_sequence(Arrival(family, tokens, max_tokens, output_tokens, 0.0, None), serial)


def scheduler_of(total_blocks: int = 100, **changes: object) -> Scheduler[ScheduledSequence]:
    given_limits = {"max_batch_size": 8, "max_num_tokens": 64, **changes}
    return Scheduler(
        SchedulerLimits(total_blocks=total_blocks, tokens_per_block=SIZE, **given_limits),  # type: ignore[arg-type]
        CheckedLatency(),
    )


def step(scheduler: Scheduler[ScheduledSequence]) -> None:
    assert scheduler.begin(0.0) is not None
    scheduler.complete(0.0)


def test_the_last_prompt_token_is_computed_even_if_all_blocks_are_cached() -> None:
    scheduler = scheduler_of()
    for serial in range(2):
        sequence = sequence_of(3 * SIZE, 1, serial=serial)
        scheduler.submit(sequence, 0.0)
        step(scheduler)
    assert sequence.cached_tokens == 2 * SIZE


def test_output_is_reused_but_for_its_last_token() -> None:
    scheduler = scheduler_of()
    first = sequence_of(SIZE, 2 * SIZE, serial=1)
    scheduler.submit(first, 0.0)
    while first.state is not SequenceState.DONE:
        step(scheduler)
    # KV of SIZE + 2 * SIZE - 1 tokens is there: two full blocks, the second made of output.
    assert len(first.hashes) == 2
    follow = ScheduledSequence("follow", 3 * SIZE, [*first.hashes, 99], root=first.root, max_tokens=1)
    scheduler.submit(follow, 0.0)
    step(scheduler)
    assert follow.cached_tokens == 2 * SIZE


def test_long_prompts_are_computed_in_chunks_of_whole_blocks_beside_decoding() -> None:
    scheduler = scheduler_of(max_num_tokens=22)
    assert isinstance(scheduler.latency, CheckedLatency)
    scheduler.submit(sequence_of(2, 20), 0.0)
    step(scheduler)
    scheduler.submit(sequence_of(50, 1, family=1, serial=1), 0.0)
    for _ in range(3):
        step(scheduler)
    chunks = [shape.prefill_tokens for shape in scheduler.latency.shapes[1:]]
    assert chunks == [20, 20, 10]
    assert [shape.decode_sequences for shape in scheduler.latency.shapes[1:]] == [1, 1, 1]
    assert [shape.prefill_ends for shape in scheduler.latency.shapes[1:]] == [0, 0, 1]
    assert [shape.prefill_pairs for shape in scheduler.latency.shapes[1:]] == [210.0, 610.0, 455.0]


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler = scheduler_of(max_num_tokens=40, chunked_prefill=False)
    for serial in range(2):
        scheduler.submit(sequence_of(30, 1, family=serial, serial=serial), 0.0)
    step(scheduler)
    assert [s.request_id for s in scheduler.prefilling] == ["1"]
    assert not scheduler.limits.fits(41, 1)


def test_a_prompt_whose_prefix_is_being_computed_waits_to_reuse_it() -> None:
    scheduler = scheduler_of(max_num_tokens=64)
    for serial in range(3):
        scheduler.submit(sequence_of(5 * SIZE + 1, 4, family=serial // 2, serial=serial), 0.0)
    step(scheduler)
    assert [s.request_id for s in scheduler.decoding.sequences] == ["0", "2"]
    step(scheduler)
    assert scheduler.cached_prompt_tokens == 5 * SIZE


def test_admission_promises_blocks_to_the_last_token() -> None:
    scheduler = scheduler_of(total_blocks=10)
    for serial in range(3):
        scheduler.submit(sequence_of(SIZE, 4 * SIZE + 1, family=serial, serial=serial), 0.0)
    step(scheduler)
    assert len(scheduler.decoding) == 2
    assert scheduler.blocked
    for _ in range(4 * SIZE):
        step(scheduler)
    assert not scheduler.decoding.sequences
    step(scheduler)
    assert len(scheduler.decoding) == 1


def test_max_utilization_admits_more_and_preempts_the_newest() -> None:
    scheduler = scheduler_of(total_blocks=10, guaranteed_no_evict=False)
    sequences = [sequence_of(SIZE, 4 * SIZE + 1, family=serial, serial=serial) for serial in range(3)]
    for sequence in sequences:
        scheduler.submit(sequence, 0.0)
    step(scheduler)
    assert len(scheduler.decoding) == 3
    while any(sequence.state is not SequenceState.DONE for sequence in sequences):
        step(scheduler)
    assert [sequence.preemptions > 0 for sequence in sequences] == [False, False, True]
    assert all(sequence.produced_tokens == 4 * SIZE + 1 for sequence in sequences)


def test_cancelling_during_a_step_takes_effect_at_once() -> None:
    scheduler = scheduler_of()
    sequences = [sequence_of(10, 5, family=serial, serial=serial) for serial in range(3)]
    scheduler.submit(sequences[0], 0.0)
    step(scheduler)
    scheduler.submit(sequences[1], 0.0)
    assert scheduler.begin(0.0) is not None
    scheduler.submit(sequences[2], 0.0)
    for sequence in sequences:
        scheduler.end(sequence)
        scheduler.end(sequence)
    assert scheduler.pool.used_blocks == scheduler.queued_prefill_tokens == 0
    assert scheduler.complete(0.0) == ([], [])
    assert scheduler.begin(0.0) is None


def test_misuse_is_refused() -> None:
    scheduler = scheduler_of(total_blocks=4)
    with pytest.raises(ValueError, match="can never fit"):
        scheduler.submit(sequence_of(SIZE, 4 * SIZE), 0.0)
    sequence = sequence_of(SIZE, 1)
    sequence.hashes.append(1)
    with pytest.raises(ValueError, match="2 hashes for 1 full blocks"):
        scheduler.submit(sequence, 0.0)
    scheduler.submit(sequence_of(1, 2), 0.0)
    scheduler.begin(0.0)
    with pytest.raises(RuntimeError, match="has not been completed"):
        scheduler.begin(0.0)
    with pytest.raises(ValueError, match="raise the first"):
        SchedulerLimits(total_blocks=4, max_batch_size=64, max_num_tokens=64)
