"""OutputReader: every token once, in order, however the library's object grows."""

from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import FinishReason, SamplingParams, TokenDelta, TokenLogprob
from serve.engines.trtllm.stream import OutputReader, token_logprob
from serve.errors import StreamLost

END_ID, STOP_WORD = 7, 8


@dataclass
class Output:
    """The part of a `CompletionOutput` that is read."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    request_perf_metrics: Any = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


def reader(**sampling: Any) -> OutputReader:
    sampling = {"max_tokens": 100, "stop_token_ids": (END_ID, STOP_WORD), **sampling}
    return OutputReader(SamplingParams(**sampling), END_ID, submitted_s=10.0)


def read_all(deltas: list[TokenDelta | None]) -> tuple[int, ...]:
    return tuple(token for delta in deltas if delta is not None for token in delta.token_ids)


def test_trap_2_3_the_same_object_is_read_by_its_growth() -> None:
    output, found = Output(), reader()
    output.token_ids.extend([1, 2])
    first = found.read(output, 11.0, cached_tokens=5)
    assert first is not None
    assert first.token_ids == (1, 2)
    assert first.prefill is not None
    assert (first.prefill.cached_tokens, first.prefill.prefill_s) == (5, 1.0)
    assert found.read(output, 11.5) is None
    output.token_ids.append(3)
    assert found.read(output, 12.0) == TokenDelta((3,), emitted_s=12.0)
    output.finish_reason = "length"
    assert found.read(output, 12.5) == TokenDelta((), FinishReason.LENGTH)
    assert found.generated == 3


def test_a_stop_word_was_cut_off_by_the_library() -> None:
    output, found = Output([1, 2]), reader()
    found.read(output, 11.0)
    output.token_ids, output.finish_reason, output.stop_reason = [1, 2, 3], "stop", STOP_WORD
    delta = found.read(output, 12.0)
    assert delta == TokenDelta((3,), FinishReason.STOP, STOP_WORD, emitted_s=12.0)


@pytest.mark.parametrize("is_included", [True, False])
def test_an_end_id_may_be_among_the_tokens_or_not(is_included: bool) -> None:
    output, found = Output([1, 2]), reader()
    found.read(output, 11.0)
    output.token_ids += [END_ID] if is_included else []
    output.finish_reason = "stop"
    delta = found.read(output, 12.0)
    assert delta == TokenDelta((), FinishReason.STOP, END_ID)


def test_a_stop_word_that_was_not_cut_off_is_left_out() -> None:
    delta = reader().read(Output([1, STOP_WORD], None, "stop"), 11.0)
    assert delta is not None
    assert (delta.token_ids, delta.stop_token_id) == ((1,), STOP_WORD)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("length", FinishReason.LENGTH),
        ("cancelled", FinishReason.CANCELLED),
        ("timeout", FinishReason.CANCELLED),
        ("not_finished", FinishReason.LENGTH),
        ("something new", FinishReason.CANCELLED),
    ],
)
def test_reasons(theirs: str, ours: FinishReason) -> None:
    delta = reader().read(Output([1], None, theirs), 11.0)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ((1,), ours, None)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_scoring_drops_the_token_that_had_to_be_generated(reason: str) -> None:
    found = reader(max_tokens=0, logprobs=1)
    scores = (None, TokenLogprob(2, -1.0))
    delta = found.read(Output([1], [{1: Logprob(-1.0)}], reason), 11.0, prompt_logprobs=scores)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ((), FinishReason.LENGTH, None)
    assert delta.prefill is not None
    assert delta.prefill.prompt_logprobs == scores
    assert found.generated == 0


def test_an_output_that_loses_tokens_ends_the_stream() -> None:
    for broken in ([1], [1, 9, 3]):
        found = reader()
        found.read(Output([1, 2]), 11.0)
        with pytest.raises(StreamLost, match="went back"):
            found.read(Output(broken), 12.0)


def test_tokens_wait_for_their_logprobs() -> None:
    found, output = reader(logprobs=1), Output([1, 2], [{1: Logprob(-0.5)}])
    first = found.read(output, 11.0)
    assert first is not None
    assert first.token_ids == (1,)
    output.logprobs = [{1: Logprob(-0.5)}, {2: Logprob(-0.25), 9: Logprob(-0.1)}]
    second = found.read(output, 12.0)
    assert second is not None
    assert second.logprobs == (TokenLogprob(2, -0.25, ((9, -0.1),)),)
    output.token_ids.append(3)
    output.finish_reason = "length"
    with pytest.raises(StreamLost, match="2 logprobs for 3 tokens"):
        found.read(output, 13.0)


def test_logprobs_of_a_cut_stop_token_are_passed_over() -> None:
    output = Output([1], [{1: Logprob(-0.5)}, {STOP_WORD: Logprob(-0.5)}], "stop", STOP_WORD)
    delta = reader(logprobs=0).read(output, 11.0)
    assert delta is not None
    assert delta.logprobs == (TokenLogprob(1, -0.5),)


def test_one_position() -> None:
    entry = {3: Logprob(-2.0, 5), 1: Logprob(-0.5, 1), 2: Logprob(-1.0, 2)}
    assert token_logprob(3, entry, 2) == TokenLogprob(3, -2.0, ((1, -0.5), (2, -1.0)))
    assert token_logprob(3, -0.75, 0) == TokenLogprob(3, -0.75)
    assert token_logprob(3, {3: Logprob(1e-7)}, 0) == TokenLogprob(3, 0.0)
    with pytest.raises(StreamLost, match="without the token 4"):
        token_logprob(4, entry, 2)


@pytest.mark.parametrize("unit", [float, lambda s: timedelta(seconds=s)])
def test_measured_queue_times_are_told(unit: Any) -> None:
    timing = SimpleNamespace(arrival_time=unit(100.0), first_scheduled_time=unit(100.25))
    output = Output([1], request_perf_metrics=SimpleNamespace(timing_metrics=timing))
    delta = reader().read(output, 11.0)
    assert delta is not None
    assert delta.prefill is not None
    assert (delta.prefill.queue_s, delta.prefill.prefill_s) == (0.25, 0.75)


def test_times_that_make_no_sense_are_not_told() -> None:
    timing = SimpleNamespace(arrival_time=5.0, first_scheduled_time=0.0)
    delta = reader().read(Output([1], request_perf_metrics=SimpleNamespace(timing_metrics=timing)), 11.0)
    assert delta is not None
    assert delta.prefill is not None
    assert delta.prefill.queue_s == 0.0


@given(chunks=st.lists(st.lists(st.integers(10, 20), max_size=4), max_size=8), ends_with_stop=st.booleans())
def test_whatever_the_chunks_each_token_comes_once(chunks: list[list[int]], ends_with_stop: bool) -> None:
    output, found = Output(logprobs=[]), reader(logprobs=0)
    deltas: list[TokenDelta | None] = []
    for chunk in chunks:
        output.token_ids.extend(chunk)
        assert output.logprobs is not None
        output.logprobs.extend({token: Logprob(-1.0)} for token in chunk)
        deltas.append(found.read(output, 11.0 + len(deltas)))
    output.finish_reason, output.stop_reason = ("stop", STOP_WORD) if ends_with_stop else ("length", None)
    deltas.append(found.read(output, 50.0))
    told = [delta for delta in deltas if delta is not None]
    assert read_all(deltas) == tuple(token for chunk in chunks for token in chunk)
    assert [delta.prefill is not None for delta in told] == [True] + [False] * (len(told) - 1)
    assert [delta.finish_reason is not None for delta in told] == [False] * (len(told) - 1) + [True]
    assert all(delta.logprobs is not None and len(delta.logprobs) == len(delta.token_ids) for delta in told)
