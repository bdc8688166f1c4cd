"""What crosses the socket arrives as it was sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.framing import FrameReader
from serve.core.kv_events import KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.request import FinishReason, GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.remote.wire import (
    Cancel,
    Command,
    Commands,
    Failed,
    Follow,
    Generate,
    Report,
    Start,
    Started,
    Stop,
    Stopped,
    Unfollow,
    decode_commands,
    decode_report,
    error_from_wire,
    error_to_wire,
    pack,
    stats_from_wire,
    stats_to_wire,
)
from serve.errors import (
    BundleMismatch,
    ConfigError,
    ContextTooLong,
    EngineDead,
    Overloaded,
    RayTRTError,
    RequestError,
    StreamLost,
)

numbers = st.integers(0, 2**40)
hashes = st.integers(0, 2**64 - 1)
tokens = st.lists(st.integers(0, 2**32 - 1)).map(tuple)
deltas = st.builds(TokenDelta, token_ids=tokens, finish_reason=st.none() | st.sampled_from(FinishReason))
blocks = st.lists(hashes, min_size=1, max_size=4).map(tuple)
batches = st.builds(
    KvEventBatch,
    numbers,
    st.lists(
        st.builds(KvStored, blocks, hashes)
        | st.builds(KvRemoved, blocks)
        | blocks.map(lambda block: KvSnapshot(block, block)),
        min_size=1,
        max_size=3,
    ).map(tuple),
)
counts = st.integers(0, 2**50)
statistics = st.builds(
    EngineStats,
    counts,
    counts,
    counts,
    counts,
    counts,
    counts,
    st.floats(0, 1e9),
    *[counts] * 4,
    st.floats(0, 1e9),
    counts,
    st.floats(0, 1e18),
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(),
    model=st.text(),
    prompt=tokens.map(pack_tokens),
    sampling=st.builds(SamplingParams, seed=st.none() | numbers, max_tokens=counts),
)
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(Start),
    st.builds(Stop),
    st.builds(Generate, numbers, requests),
    st.builds(Cancel, numbers),
    st.builds(Follow, numbers),
    st.builds(Unfollow, numbers),
)
errors: list[RayTRTError] = [
    RequestError("temperature must be >= 0", "temperature", "invalid_value"),
    ContextTooLong(5000, 16, 4096, "prompt"),
    Overloaded("full", 2.5),
    EngineDead("rank 1 is gone"),
    StreamLost("2 logprobs for 3 tokens"),
    BundleMismatch("built for sm_90, this is sm_80"),
    ConfigError("no such file"),
]
INFO = EngineInfo("e 1", 1, 2, 3, 4, "cpu")
answers = st.none() | st.just(Stopped()) | st.just(Started(INFO)) | st.just(Failed(error_to_wire(errors[-1])))


def unframed(data: bytes) -> bytes:
    (body,) = FrameReader().feed(data)
    return body


@given(items=st.lists(commands).map(tuple))
def test_commands_survive(items: tuple[Command, ...]) -> None:
    assert decode_commands(unframed(pack(Commands(items)))).items == items


@given(
    report=st.builds(
        Report,
        st.lists(st.tuples(numbers, deltas), max_size=4).map(tuple),
        st.lists(st.tuples(numbers, st.sampled_from(errors).map(error_to_wire)), max_size=3).map(tuple),
        st.lists(st.tuples(numbers, batches), max_size=3).map(tuple),
        counts,
        st.none() | statistics.map(stats_to_wire),
        st.none() | st.text(),
        st.booleans(),
        answers,
    )
)
def test_reports_survive(report: Report) -> None:
    assert decode_report(unframed(pack(report))) == report


@given(stats=statistics)
def test_statistics_keep_their_types(stats: EngineStats) -> None:
    sent = decode_report(unframed(pack(Report(stats=stats_to_wire(stats))))).stats
    assert sent is not None
    assert repr(stats_from_wire(sent)) == repr(stats)


@pytest.mark.parametrize("error", errors, ids=lambda error: type(error).__name__)
def test_errors_keep_class_and_arguments(error: RayTRTError) -> None:
    received = decode_report(unframed(pack(Report(errors=((1, error_to_wire(error)),)))))
    rebuilt = error_from_wire(received.errors[0][1])
    assert type(rebuilt) is type(error)
    assert [repr(arg) for arg in rebuilt.args] == [repr(arg) for arg in error.args]
    assert str(rebuilt) == str(error)


class Homemade(RequestError):
    """Of a class that the other side does not know."""


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), Homemade("x"), OSError(2, "no such file")])
def test_what_is_no_error_of_ours_is_the_engines_death(error: Exception) -> None:
    rebuilt = error_from_wire(error_to_wire(error))
    assert type(rebuilt) is EngineDead
    assert type(error).__name__ in str(rebuilt)


def test_an_argument_that_has_no_wire_form_crosses_as_text() -> None:
    rebuilt = error_from_wire(error_to_wire(ConfigError(OSError("disk full"))))
    assert type(rebuilt) is ConfigError
    assert str(rebuilt) == "disk full"
