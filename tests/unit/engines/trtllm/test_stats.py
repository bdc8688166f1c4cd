"""EngineStats from the library's records and the adapter's own counts."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, SamplingParams, TokenDelta, pack_tokens
from serve.engines.trtllm.flights import Flight, Flights
from serve.engines.trtllm.stats import (
    IterationRecord,
    OwnCounts,
    StepTotals,
    engine_stats,
    read_record,
    retry_after_s,
    waiting_of,
)
from serve.engines.trtllm.stream import OutputReader

json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
counts = st.builds(
    OwnCounts, *[st.integers(0, 40)] * 3, blocks_at_most=st.integers(0, 200), prompt_tokens=st.integers(0, 99)
)
records = st.none() | st.builds(
    IterationRecord, st.floats(0, 1), *[st.none() | st.integers(0, 60)] * 2, st.none() | st.integers(0, 200), st.none()
)


def test_a_record_of_the_library() -> None:
    record = {
        "iterLatencyMS": 12.5,
        "numActiveRequests": 7,
        "numQueuedRequests": 2,
        "kvCacheStats": {"maxNumBlocks": 100, "freeNumBlocks": 60, "usedNumBlocks": 40, "tokensPerBlock": 32},
        "inflightBatchingStats": {"numCtxTokens": 3},
    }
    assert read_record(record) == IterationRecord(0.0125, 7, 2, 40, 100, 3)


@given(
    record=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("iterLatencyMS", "numQueuedRequests", "kvCacheStats", "inflightBatchingStats"), json_like
        ),
    )
)
def test_trap_2_6_nothing_in_a_record_can_break_the_reader(record: dict[str, Any]) -> None:
    found = read_record(record)
    assert found.step_s >= 0
    assert found.queued is None or found.queued >= 0


@given(own=counts, record=records, batch=st.integers(1, 50), total=st.integers(1, 150), reusable=st.integers(0, 200))
def test_stats_are_sane(own: OwnCounts, record: IterationRecord | None, batch: int, total: int, reusable: int) -> None:
    stats = engine_stats(own, record, StepTotals(), max_batch_size=batch, total_blocks=total, reusable_blocks=reusable)
    assert stats.running + stats.waiting == own.submitted + own.streaming
    assert stats.waiting >= 0
    assert stats.running >= own.streaming - max(0, own.streaming - batch)
    assert stats.used_blocks >= 0
    assert stats.cached_blocks >= 0
    assert stats.used_blocks + stats.cached_blocks <= stats.total_blocks == total
    if own.streaming and own.blocks_at_most >= own.streaming:
        assert stats.used_blocks > 0


def test_without_a_record_the_batch_is_filled_first() -> None:
    own = OwnCounts(submitted=5, streaming=3, blocks_at_most=20)
    stats = engine_stats(own, None, StepTotals(5, 0.5, 70), max_batch_size=6, total_blocks=100, reusable_blocks=10)
    assert (stats.running, stats.waiting, stats.used_blocks, stats.cached_blocks) == (6, 2, 20, 10)
    assert (stats.steps, stats.busy_s, stats.computed_prompt_tokens) == (5, 0.5, 70)


def test_the_library_knows_of_requests_that_have_no_blocks() -> None:
    own = OwnCounts(submitted=5, streaming=3)
    assert waiting_of(own, IterationRecord(queued=4), 100) == 4
    assert waiting_of(own, IterationRecord(queued=9), 100) == 5  # a late record: the others have begun since
    assert waiting_of(replace(own, submitted=0), IterationRecord(queued=4), 100) == 0
    assert waiting_of(own, IterationRecord(), 6) == 2


def test_shared_blocks_are_counted_once_by_the_library() -> None:
    own = OwnCounts(streaming=4, blocks_at_most=80)
    stats = engine_stats(
        own, IterationRecord(used_blocks=25), StepTotals(), max_batch_size=8, total_blocks=100, reusable_blocks=0
    )
    assert stats.used_blocks == 25


def iterations(*numbers: int, latency_ms: float = 10.0) -> list[dict[str, Any]]:
    batch = {"numCtxTokens": 30}
    return [{"iter": number, "iterLatencyMS": latency_ms, "inflightBatchingStats": batch} for number in numbers]


def test_steps_are_counted_and_lost_ones_too() -> None:
    totals = StepTotals().add(iterations(7, 8))
    assert totals == StepTotals(2, 0.02, 60, 8)
    totals = totals.add(iterations(12, 13, latency_ms=20.0))
    assert (totals.steps, totals.prefill_tokens, totals.last) == (7, 60 + 5 * 30, 13)
    assert totals.busy_s == pytest.approx(0.02 + 5 * 0.02)


@pytest.mark.parametrize("numbers", [(3, 4), (10**9, 10**9 + 1)])
def test_a_step_number_that_jumps_is_not_believed(numbers: tuple[int, ...]) -> None:
    totals = StepTotals(100, 1.0, 0, 100).add(iterations(*numbers))
    assert 102 <= totals.steps <= 120
    assert totals.busy_s == pytest.approx(1.0 + (totals.steps - 100) * 0.01)
    assert totals.last == numbers[-1]


def test_steps_without_a_duration_are_unknown() -> None:
    assert StepTotals().add([{"iter": 3}, {"iter": 4, "iterLatencyMS": None}]) == StepTotals()
    assert StepTotals().add([{"iterLatencyMS": 5.0}] * 3).steps == 3


@given(batches=st.lists(st.lists(st.dictionaries(st.sampled_from(["iter", "iterLatencyMS"]), json_like), max_size=4)))
def test_totals_never_fall(batches: list[list[dict[str, Any]]]) -> None:
    totals = StepTotals()
    for batch in batches:
        before, totals = totals, totals.add(batch)
        assert totals.steps >= before.steps
        assert totals.busy_s >= before.busy_s


@pytest.mark.parametrize(("waiting", "expected"), [(0, 2.0), (8, 2.0), (32, 8.0), (10_000, 30.0)])
def test_a_later_try_when_more_wait(waiting: int, expected: float) -> None:
    assert retry_after_s(IterationRecord(step_s=0.02), waiting, 8) == pytest.approx(expected)
    assert retry_after_s(None, waiting, 8) == pytest.approx(expected)


def flight(name: str, prompt_tokens: int) -> Flight:
    request = GenerateRequest(f"id {name}", "m", pack_tokens([1] * prompt_tokens))
    return Flight(name, request, None, OutputReader(SamplingParams(), 0, 0.0))


def test_counts_follow_a_request_from_its_submission_to_its_end() -> None:
    flights, one, other = Flights(4), flight("1", 10), flight("2", 3)
    flights.add(one)
    flights.add(other)
    assert flights.counts() == OwnCounts(submitted=2, queued_prefill_tokens=13, blocks_at_most=4)
    flights.told(one, TokenDelta((1,), prefill=PrefillInfo(cached_tokens=8)))
    expected = OwnCounts(1, 1, 3, 4, 10, 8, 1)
    assert flights.counts() == expected
    flights.leave(one)
    assert not flights.has("id 1")
    assert flights.counts() == expected  # its blocks are not free yet
    flights.remove(one)
    flights.remove(one)
    flights.remove(other)
    assert flights.counts() == OwnCounts(prompt_tokens=10, cached_prompt_tokens=8, generated_tokens=1)
    assert len(flights) == 0


def test_an_id_that_came_again_is_not_forgotten_with_the_first() -> None:
    flights, first, second = Flights(4), flight("1", 1), flight("2", 1)
    second.request = first.request
    flights.add(first)
    flights.leave(first)
    flights.add(second)
    flights.remove(first)
    assert flights.has("id 1")
    flights.told(second, TokenDelta((), FinishReason.LENGTH, prefill=PrefillInfo()))
    flights.remove(second)
    assert not flights.has("id 1")
