"""Which requests are refused, and which wait."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import EngineInfo
from serve.engines.transformers.admission import check_request, may_begin, queue_places, retry_after_s
from serve.errors import ContextTooLong, RequestError

INFO = EngineInfo("test", context_tokens=100, vocab_size=50, tokens_per_block=4, total_blocks=20, device="cpu")
counts = st.integers(0, 1000)


def request(prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", "m", pack_tokens(prompt), SamplingParams(**sampling))


@pytest.mark.parametrize(
    ("bad", "param", "value"),
    [
        (request(()), "prompt", "empty"),
        (request((1, 50)), "prompt", "50"),
        (request(logit_bias={50: 1.0}), "logit_bias", "50"),
        (request(stop_token_ids=(2, 77)), "stop_token_ids", "77"),
        (request(logprobs=21), "logprobs", "21"),
        (request(prompt_logprobs=-1), "prompt_logprobs", "-1"),
        (request((1,) * 40, max_tokens=41), "max_tokens", "81"),
    ],
)
def test_what_can_never_be_served_is_refused_by_name_and_value(bad: GenerateRequest, param: str, value: str) -> None:
    with pytest.raises(RequestError) as raised:
        check_request(bad, INFO, capacity_tokens=80)
    assert raised.value.param == param
    assert value in str(raised.value)


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(60, 41), (101, 0), (100, 1)])
def test_the_context_is_checked_before_the_cache(prompt_tokens: int, max_tokens: int) -> None:
    with pytest.raises(ContextTooLong):
        check_request(request((1,) * prompt_tokens, max_tokens=max_tokens), INFO, capacity_tokens=80)


def test_what_fits_exactly_is_served() -> None:
    check_request(request((49,) * 40, max_tokens=40, logit_bias={49: 1.0}), INFO, capacity_tokens=80)
    check_request(request((1,) * 100, max_tokens=0, prompt_logprobs=20), INFO, capacity_tokens=80)


@given(counts, st.integers(1, 100), counts, counts, counts)
def test_more_room_never_keeps_a_sequence_out(running: int, batch: int, need: int, promised: int, free: int) -> None:
    asked = {"running": running, "max_batch_size": batch, "needed_blocks": need, "promised_blocks": promised}
    if may_begin(**asked, free_blocks=free):
        assert running < batch
        assert may_begin(**asked, free_blocks=free + 1)
        assert running == 0 or need + promised <= free


def test_an_empty_engine_always_begins() -> None:
    assert may_begin(running=0, max_batch_size=1, needed_blocks=10**6, promised_blocks=0, free_blocks=0)


@given(counts, counts, st.integers(1, 100), counts)
def test_places_are_those_of_the_queue_and_those_free_in_the_batch(
    running: int, queued: int, batch: int, waiting: int
) -> None:
    places = queue_places(running=running, queued=queued, max_batch_size=batch, max_waiting=waiting)
    assert places == waiting + (max(0, batch - running) if queued == 0 else 0)


@given(st.floats(0, 1e4), counts, st.integers(1, 100))
def test_the_advice_to_come_back_is_bounded_and_grows_with_the_queue(
    interval_s: float, waiting: int, batch: int
) -> None:
    assert 0.5 <= retry_after_s(interval_s, waiting, batch) <= retry_after_s(interval_s, waiting + 1, batch) <= 30
