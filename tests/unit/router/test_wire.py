"""Messages of the event plane: what is sent arrives, and what cannot be understood says so."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_events import KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.routing.load import LoadReport
from serve.router.wire import (
    MAX_REQUEST_BYTES,
    METADATA_KEY,
    PLANE_VERSION,
    Facts,
    Hello,
    KvNews,
    LoadNews,
    OtherVersion,
    PlaneAddress,
    SnapshotPart,
    SnapshotRequest,
    decode_answer,
    decode_news,
    decode_request,
    encode,
    facts_to_metadata,
    source_of,
)

words = st.integers(0, 2**64 - 1)
counts = st.integers(0, 2**50)
blocks = st.lists(words, max_size=4).map(tuple)
events = (
    st.builds(KvStored, blocks, words, st.integers(0, 2))
    | st.builds(KvRemoved, blocks)
    | blocks.map(lambda some: KvSnapshot(some, some, (0,) * len(some)))
)
batches = st.builds(KvEventBatch, counts, st.lists(events, min_size=1, max_size=3).map(tuple))
reports = st.builds(LoadReport, *[counts] * 8, st.floats(0, 1e15), *[counts] * 2, st.floats(0, 1e6), counts, blocks)
loads = st.builds(LoadNews, words, words, counts, counts, reports, st.floats(0, 1e9))
facts = st.builds(Facts, st.text(), counts, counts, counts)
news = st.builds(KvNews, words, words, counts, st.lists(batches, max_size=3).map(tuple)) | loads
answers = st.builds(Hello, words, words, facts, st.none() | loads) | st.builds(
    SnapshotPart, words, words, counts, counts, counts, counts, st.binary(), st.binary(), st.binary()
)
requests = st.builds(SnapshotRequest, st.text(max_size=40), counts)


@given(message=news)
def test_news_arrive_as_they_were_sent(message: KvNews | LoadNews) -> None:
    assert decode_news(encode(message)) == message


@given(message=answers)
def test_answers_arrive_as_they_were_sent(message: Hello | SnapshotPart) -> None:
    assert decode_answer(encode(message)) == message


@given(message=requests)
def test_requests_arrive_as_they_were_sent_and_are_small(message: SnapshotRequest) -> None:
    frame = encode(message)
    assert decode_request(frame) == message
    assert len(frame) <= MAX_REQUEST_BYTES


@given(message=news, version=st.integers(0, 255).filter(lambda version: version != PLANE_VERSION), rest=st.binary())
def test_another_version_is_named_whatever_it_says(message: KvNews | LoadNews, version: int, rest: bytes) -> None:
    for frame in (bytes([version]) + encode(message)[1:], bytes([version]) + rest):
        for decode in (decode_news, decode_answer, decode_request):
            with pytest.raises(OtherVersion) as caught:
                decode(frame)
            assert caught.value.version == version


@given(rest=st.binary(max_size=60))
def test_what_is_no_message_is_refused(rest: bytes) -> None:
    for frame in (b"", bytes([PLANE_VERSION]) + rest):
        try:
            decode_news(frame)
        except msgspec.DecodeError:
            continue
        pytest.fail(f"{frame!r} was understood")


address = st.builds(PlaneAddress, st.text(), st.text(), st.text(), words, facts)


@given(address=address, more=st.dictionaries(st.text(), st.integers()))
def test_an_address_survives_a_replicas_metadata(address: PlaneAddress, more: dict[str, int]) -> None:
    metadata = more | address.to_metadata()
    assert PlaneAddress.from_metadata(metadata) == address
    assert metadata["tokens_per_block"] == address.facts.tokens_per_block


def test_an_address_of_another_version_is_named() -> None:
    address = PlaneAddress("a", "b", "c", 1, Facts("e", 1, 2, 3), version=PLANE_VERSION + 1)
    with pytest.raises(OtherVersion) as caught:
        PlaneAddress.from_metadata(address.to_metadata())
    assert caught.value.version == PLANE_VERSION + 1


@pytest.mark.parametrize(
    "metadata",
    [{}, {METADATA_KEY: None}, {METADATA_KEY: {"version": PLANE_VERSION}}, facts_to_metadata(Facts("", 1, 1, 1))],
)
def test_a_replica_may_have_no_event_plane(metadata: dict[str, Any]) -> None:
    assert PlaneAddress.from_metadata(metadata) is None


def test_replicas_have_names_of_their_own() -> None:
    names = {source_of(f"app#deployment#{number}") for number in range(1000)}
    assert len(names) == 1000
    assert all(0 <= name < 1 << 64 for name in names)
