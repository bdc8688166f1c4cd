"""Values that cross process borders: they survive the trip, and say when the two sides differ."""

import pickle
from functools import reduce

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.request import (
    WIRE_VERSION,
    FinishReason,
    GenerateRequest,
    PrefillInfo,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    decode_request,
    merge_deltas,
    pack_tokens,
)

token_ids = st.integers(0, 2**32 - 1)
logprobs = st.floats(-100, 0)
token_logprobs = st.builds(
    TokenLogprob,
    token_id=token_ids,
    logprob=logprobs,
    top=st.lists(st.tuples(token_ids, logprobs), max_size=3).map(tuple),
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(token_ids, st.floats(-100, 100), max_size=3),
    max_tokens=st.integers(0, 10**6),
    stop_token_ids=st.lists(token_ids, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(),
    model=st.text(),
    prompt=st.lists(token_ids, min_size=1, max_size=40).map(pack_tokens),
    sampling=samplings,
    cache_salt=st.text(),
    reply_to=st.text(),
    expected_cached_tokens=st.integers(0, 10**6),
    lora=st.text(),
)


@st.composite
def streams(draw: st.DrawFn) -> list[TokenDelta]:
    """Draw a valid stream of deltas."""
    with_logprobs = draw(st.booleans())
    deltas = []
    count = draw(st.integers(1, 6))
    for i in range(count):
        first, last = i == 0, i == count - 1
        tokens = tuple(draw(st.lists(token_ids, min_size=0 if first or last else 1, max_size=4)))
        deltas.append(
            TokenDelta(
                token_ids=tokens,
                finish_reason=draw(st.sampled_from(FinishReason)) if last else None,
                stop_token_id=draw(st.none() | token_ids) if last else None,
                logprobs=tuple(TokenLogprob(token, -1.0) for token in tokens) if with_logprobs else None,
                prefill=PrefillInfo(cached_tokens=draw(st.integers(0, 9))) if first else None,
                emitted_s=float(i + 1),
            )
        )
    return deltas


@given(request=requests)
def test_requests_survive_pickling_and_encoding(request: GenerateRequest) -> None:
    assert pickle.loads(pickle.dumps(request)) == request
    assert decode_request(msgspec.msgpack.encode(request)) == request


@given(request=requests, version=st.integers(0, 1000).filter(lambda version: version != WIRE_VERSION))
def test_another_wire_version_is_refused_by_name(request: GenerateRequest, version: int) -> None:
    data = msgspec.msgpack.encode(msgspec.structs.replace(request, wire_version=version))
    with pytest.raises(ValueError, match=f"wire version {version}, this replica {WIRE_VERSION}"):
        decode_request(data)


def test_the_version_is_where_earlier_releases_look_for_it() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(GenerateRequest("id", "model", b"")))[6] == WIRE_VERSION


@given(tokens=st.lists(token_ids, max_size=50))
def test_prompts_unpack_to_what_was_packed(tokens: list[int]) -> None:
    request = GenerateRequest("id", "model", pack_tokens(tokens))
    assert request.prompt_tokens == len(tokens)
    assert request.prompt_array().tolist() == tokens
    assert request.prompt_array().dtype == np.uint32


@pytest.mark.parametrize("token", [-1, 2**32])
def test_ids_out_of_range_cannot_be_packed(token: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([1, token])


def test_a_prompt_array_is_a_view() -> None:
    request = GenerateRequest("id", "model", pack_tokens([1, 2, 3]))
    array = request.prompt_array()
    assert not array.flags.owndata
    assert not array.flags.writeable


@given(stream=streams())
def test_merged_deltas_say_what_the_stream_says(stream: list[TokenDelta]) -> None:
    merged = reduce(merge_deltas, stream)
    assert merged.token_ids == tuple(token for delta in stream for token in delta.token_ids)
    assert merged.finish_reason == stream[-1].finish_reason
    assert merged.stop_token_id == stream[-1].stop_token_id
    assert merged.prefill == stream[0].prefill
    if merged.logprobs is not None:
        assert [entry.token_id for entry in merged.logprobs] == list(merged.token_ids)
    # When the first of its tokens was emitted.
    with_tokens = [delta.emitted_s for delta in stream if delta.token_ids]
    if with_tokens:
        assert merged.emitted_s == with_tokens[0]


@given(stream=streams(), cut=st.integers(1, 5))
def test_it_does_not_matter_in_which_order_deltas_are_merged(stream: list[TokenDelta], cut: int) -> None:
    cut = min(cut, len(stream) - 1)
    if cut:
        halves = reduce(merge_deltas, stream[:cut]), reduce(merge_deltas, stream[cut:])
        assert merge_deltas(*halves) == reduce(merge_deltas, stream)


@given(stream=streams())
def test_deltas_survive_the_wire(stream: list[TokenDelta]) -> None:
    encoded = msgspec.msgpack.encode(stream)
    assert msgspec.msgpack.decode(encoded, type=list[TokenDelta]) == stream
    assert pickle.loads(pickle.dumps(stream)) == stream


@given(entry=token_logprobs)
def test_logprobs_survive_the_wire(entry: TokenLogprob) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=TokenLogprob) == entry
