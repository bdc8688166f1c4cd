"""What replicas and gateways tell each other of caches and load: the messages, and where they are to be had.

A replica publishes `KvNews` and `LoadNews` to whoever listens (ZMQ PUB and SUB). A gateway that misses something sends
a `SnapshotRequest` (DEALER to ROUTER), and gets a `Hello` and all `SnapshotPart`s. A message is one frame: a byte with
`PLANE_VERSION`, then msgpack. So that two releases can tell, whatever they changed, that they do not understand each
other: what has another version is ignored, and the gateway routes to that replica by what it knows without it.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from serve.core.kv_events import KvEventBatch
from serve.core.routing.load import LoadReport

PLANE_VERSION = 2
METADATA_KEY = "event_plane"
MAX_REQUEST_BYTES = 1024


class OtherVersion(ValueError):
    """A message of a release that speaks another version of this wire format.

    Args:
        version: The sender's.
    """

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """What is fixed once an engine has started.

    Attributes:
        engine: Name and version of the adapter.
        tokens_per_block: Size of a KV block; the hashes of another size mean nothing.
        total_blocks: KV blocks there are.
        context_tokens: Prompt and output of one sequence, together, at most.
    """

    engine: str
    tokens_per_block: int
    total_blocks: int
    context_tokens: int


class PlaneAddress(msgspec.Struct, frozen=True):
    """Where a replica's event plane is. Part of its metadata in Ray Serve.

    Attributes:
        events: ZMQ endpoint of what it publishes.
        snapshots: ZMQ endpoint that answers requests.
        secret: What a request has to bring, so that only who belongs to the cluster can make the replica work.
        epoch: Of the engine when the replica started.
        facts: Of the engine.
        version: Of the wire format.
    """

    events: str
    snapshots: str
    secret: str
    epoch: int
    facts: Facts
    version: int = PLANE_VERSION

    def to_metadata(self) -> dict[str, Any]:
        """Return it as `record_replica_metadata` can say it, and the facts for who knows no event plane."""
        return facts_to_metadata(self.facts) | {METADATA_KEY: msgspec.to_builtins(self)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "PlaneAddress | None":
        """Return what a replica said of its event plane; None if it has none, or one that is not understood.

        Raises:
            OtherVersion: It speaks another version.
        """
        said = metadata.get(METADATA_KEY)
        if not isinstance(said, Mapping):
            return None
        if said.get("version") != PLANE_VERSION:
            raise OtherVersion(int(said.get("version") or 0))
        try:
            return msgspec.convert(said, cls)
        except msgspec.ValidationError:
            return None


class KvNews(msgspec.Struct, frozen=True, array_like=True, tag="k"):
    """Changes of a KV cache.

    Attributes:
        source: Who says it: `source_of` the replica's id.
        epoch: Of its engine: a random number for each start.
        number: Counts the messages published in this epoch, from 1.
        batches: Of the engine, consecutive, in order.
    """

    source: int
    epoch: int
    number: int
    batches: tuple[KvEventBatch, ...]


class LoadNews(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """Load, and proof of life.

    Attributes:
        source, epoch, number: As in `KvNews`.
        sequence: Of the last batch published before.
        report: The load.
        sent_s: `time.monotonic()` of the replica's host.
    """

    source: int
    epoch: int
    number: int
    sequence: int
    report: LoadReport
    sent_s: float


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True):
    """Tell me all that is in the cache.

    Attributes:
        secret: From the address.
        request: A number that the answer repeats; a later request has a higher one.
    """

    secret: str
    request: int


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    """Begins an answer.

    Attributes:
        source, epoch: As in `KvNews`.
        facts: Of the engine.
        load: The last that was published; None before the first.
    """

    source: int
    epoch: int
    facts: Facts
    load: LoadNews | None


class SnapshotPart(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Some of the blocks in a cache. All parts of one answer are of one moment.

    Attributes:
        source, epoch: As in `KvNews`.
        request: Of the gateway.
        sequence: Of the last batch that is in it.
        part: From 0.
        parts: How many there are; at least one.
        hashes, parents: Little-endian 64-bit integers, one a block.
        tiers: One byte a block; empty if all are on the GPU.
    """

    source: int
    epoch: int
    request: int
    sequence: int
    part: int
    parts: int
    hashes: bytes
    parents: bytes
    tiers: bytes = b""


News = KvNews | LoadNews
Answer = Hello | SnapshotPart

_PREFIX = bytes([PLANE_VERSION])
_encode = msgspec.msgpack.Encoder().encode
_decode_news: Callable[[memoryview], News] = msgspec.msgpack.Decoder(News).decode
_decode_answer: Callable[[memoryview], Answer] = msgspec.msgpack.Decoder(Answer).decode
_decode_request = msgspec.msgpack.Decoder(SnapshotRequest).decode


def source_of(replica_id: str) -> int:
    """Return the 64-bit name of a replica in messages.

    A port may have been another replica's a moment ago, so messages say of whom they are.
    """
    return int.from_bytes(hashlib.blake2b(replica_id.encode(), digest_size=8).digest(), "little")


def facts_to_metadata(facts: Facts) -> dict[str, Any]:
    """Return the facts of an engine, by name."""
    return msgspec.structs.asdict(facts)


def encode(message: News | Answer | SnapshotRequest) -> bytes:
    """Return a message as one frame."""
    return _PREFIX + _encode(message)


def decode_news(frame: bytes) -> News:
    """Decode what was published.

    Raises:
        OtherVersion: By another release.
        msgspec.DecodeError: It is no such message.
    """
    return _decode_news(_body(frame))


def decode_answer(frame: bytes) -> Answer:
    """Decode an answer to a request; raises as `decode_news` does."""
    return _decode_answer(_body(frame))


def decode_request(frame: bytes) -> SnapshotRequest:
    """Decode a request; raises as `decode_news` does."""
    return _decode_request(_body(frame))


def _body(frame: bytes) -> memoryview:
    if not frame:
        raise msgspec.DecodeError("an empty message")
    if frame[0] != PLANE_VERSION:
        raise OtherVersion(frame[0])
    return memoryview(frame)[1:]
