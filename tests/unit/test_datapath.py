"""The two ends of the data path, over real sockets on one event loop."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.framing import FrameReader
from serve.core.request import FinishReason, PrefillInfo, TokenDelta
from serve.datapath.frames import (
    Frame,
    Hello,
    ReplyAddress,
    decode_frame,
    error_from_wire,
    error_to_wire,
    pack,
)
from serve.datapath.listener import DeltaListener, DeltaStream
from serve.datapath.sender import DeltaSender
from serve.errors import ConfigError, ContextTooLong, EngineDead, Overloaded, RayTRTError, RequestError, StreamLost

deltas = st.builds(
    TokenDelta,
    token_ids=st.lists(st.integers(0, 2**32 - 1)).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    prefill=st.none() | st.builds(PrefillInfo, cached_tokens=st.integers(0, 2**20)),
)


@given(frames=st.lists(st.lists(st.tuples(st.integers(0, 2**40), deltas))), cut=st.integers(1, 50))
def test_frames_survive_any_segmentation_of_the_byte_stream(
    frames: list[list[tuple[int, TokenDelta]]], cut: int
) -> None:
    sent = [Frame(deltas=tuple(items)) for items in frames]
    stream = b"".join(pack(frame) for frame in sent)
    reader = FrameReader()
    received = [
        decode_frame(body) for start in range(0, len(stream), cut) for body in reader.feed(stream[start : start + cut])
    ]
    assert received == sent


def test_a_length_no_peer_of_ours_would_send_is_refused() -> None:
    with pytest.raises(ValueError, match="not a raytrt peer"):
        list(FrameReader().feed(b"GET / HTTP/1.1\r\n\r\n"))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("temperature must be >= 0", "temperature", "invalid_value"),
        ContextTooLong(5000, 16, 4096, "prompt"),
        Overloaded("full", 2.5),
        EngineDead("rank 1 is gone"),
        StreamLost("2 logprobs for 3 tokens"),
    ],
)
def test_errors_cross_the_wire_whole(error: RayTRTError) -> None:
    received = decode_frame(pack(Frame(errors=((1, error_to_wire(error)),)))[4:])
    rebuilt = error_from_wire(received.errors[0][1])
    assert type(rebuilt) is type(error)
    assert [repr(arg) for arg in rebuilt.args] == [repr(arg) for arg in error.args]  # 5000, not 5000.0
    assert str(rebuilt) == str(error)


def test_an_error_that_is_not_the_clients_becomes_engine_dead() -> None:
    assert isinstance(error_from_wire(error_to_wire(ConfigError("no such file"))), EngineDead)


async def test_deltas_that_wait_together_arrive_merged_and_in_order() -> None:
    stream = DeltaStream()
    stream.push(TokenDelta((1,), prefill=PrefillInfo(3)))
    stream.push(TokenDelta((2, 3)))
    stream.push(TokenDelta((4,), FinishReason.LENGTH))
    assert await stream.next() == TokenDelta((1, 2, 3, 4), FinishReason.LENGTH, prefill=PrefillInfo(3))


async def test_what_was_queued_before_an_error_is_delivered_first() -> None:
    stream = DeltaStream()
    stream.push(TokenDelta((1,)))
    stream.fail(EngineDead("gone"))
    stream.fail(Overloaded("later"))
    assert (await stream.next()).token_ids == (1,)
    with pytest.raises(EngineDead):
        await stream.next()


@pytest.fixture
async def listener() -> DeltaListener:
    listener = DeltaListener("127.0.0.1")
    await listener.start()
    return listener


async def test_streams_of_two_replicas_are_kept_apart(listener: DeltaListener) -> None:
    senders = [DeltaSender(f"replica{i}") for i in range(2)]
    opened = [listener.open() for _ in range(20)]
    for number, (address, _) in enumerate(opened):
        reply = await senders[number % 2].open(ReplyAddress.from_text(address.to_text()))
        for token in range(50):
            reply.send(TokenDelta((number, token)))
        reply.send(TokenDelta((), FinishReason.LENGTH))
    for number, (_, stream) in enumerate(opened):
        tokens: list[int] = []
        while True:
            delta = await stream.next()
            tokens += delta.token_ids
            if delta.finish_reason is not None:
                break
        assert tokens == [value for token in range(50) for value in (number, token)]
    for sender in senders:
        sender.close()
    await listener.close()


async def test_a_replica_whose_connection_breaks_fails_its_streams_only(listener: DeltaListener) -> None:
    doomed, survivor = DeltaSender("doomed"), DeltaSender("survivor")
    streams = []
    for sender in (doomed, survivor):
        address, stream = listener.open()
        (await sender.open(address)).send(TokenDelta((7,)))
        assert (await stream.next()).token_ids == (7,)
        streams.append((stream, sender, address))
    doomed.close()
    with pytest.raises(EngineDead, match="doomed"):
        await streams[0][0].next()
    (await survivor.open(streams[1][2])).send(TokenDelta((8,), FinishReason.STOP))
    assert (await streams[1][0].next()).token_ids == (8,)
    survivor.close()
    await listener.close()


async def test_a_sender_connects_again_after_its_link_was_lost(listener: DeltaListener) -> None:
    sender = DeltaSender("replica")
    address, _ = listener.open()
    first = await sender.open(address)
    for connection in list(listener._connections):
        connection.abort()
    while not first.lost:  # noqa: ASYNC110  # nothing signals it
        await asyncio.sleep(0)
    address, stream = listener.open()
    (await sender.open(address)).send(TokenDelta((9,), FinishReason.STOP))
    assert (await stream.next()).token_ids == (9,)
    sender.close()
    await listener.close()


async def test_a_peer_with_the_wrong_secret_is_dropped_and_can_inject_nothing(listener: DeltaListener) -> None:
    address, stream = listener.open()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(pack(Hello("guess", "intruder")) + pack(Frame(((address.stream, TokenDelta((1,))),))))
    assert await reader.read() == b""
    writer.close()
    sender = DeltaSender("replica")
    (await sender.open(address)).send(TokenDelta((2,), FinishReason.STOP))
    assert (await stream.next()).token_ids == (2,)
    sender.close()
    await listener.close()


async def test_an_old_connection_that_closes_late_does_not_end_the_streams_of_a_new_one(
    listener: DeltaListener,
) -> None:
    old, new = DeltaSender("replica"), DeltaSender("replica")
    streams = []
    for sender in (old, new):
        address, stream = listener.open()
        (await sender.open(address)).send(TokenDelta((1,)))
        await stream.next()
        streams.append((address, stream))
    old.close()
    with pytest.raises(EngineDead):
        await streams[0][1].next()
    (await new.open(streams[1][0])).send(TokenDelta((2,), FinishReason.STOP))
    assert (await streams[1][1].next()).token_ids == (2,)
    new.close()
    await listener.close()


@pytest.mark.parametrize("greeting", [b"\xff\xff\xff\xff", pack(Hello("s\u00e9cret", "x")), pack(Frame())])
async def test_a_stranger_is_dropped_before_anything_is_kept_for_it(listener: DeltaListener, greeting: bytes) -> None:
    address, _ = listener.open()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(greeting)
    assert await reader.read() == b""
    writer.close()
    await listener.close()


async def test_a_gateway_that_cannot_be_reached_is_an_engine_error_that_says_so(listener: DeltaListener) -> None:
    address, _ = listener.open()
    await listener.close()
    with pytest.raises(EngineDead, match="must reach each other"):
        await DeltaSender("replica").open(address)
