"""What a replica and the process that hosts its engine tell each other.

One connection is one engine's life. The replica opens it with a `Hello` and then sends `Commands`; the host answers
with `Report`s. Both gather what an event-loop turn brings, for all sequences, and send it as one frame
(`serve.core.framing`) with a msgpack body.
"""

from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter

import msgspec

from serve.core.framing import frame
from serve.core.kv_events import KvEventBatch
from serve.core.request import WIRE_VERSION, GenerateRequest, TokenDelta
from serve.engines.protocol import EngineInfo, EngineStats
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

PROTOCOL_VERSION = 2
MAX_HELLO_BYTES = 1024


def release() -> str:
    """Return the version of raytrt in this environment, for messages."""
    try:
        return version("raytrt")
    except PackageNotFoundError:
        return "that is not installed but on the path"


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Opens the connection. These fields stay as they are, so that two releases can refuse each other by name.

    Attributes:
        secret: What the host gave to its replica on another way.
        release: Version of raytrt, for messages.
        protocol: Version of this module.
        wire: Version of requests and deltas.
    """

    secret: str
    release: str
    protocol: int = PROTOCOL_VERSION
    wire: int = WIRE_VERSION


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """Start the engine; answered with `Started` or `Failed`."""


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """Run one sequence; `stream` is the number that its deltas and its error will have."""

    stream: int
    request: GenerateRequest


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """End a sequence that nobody reads any more."""

    stream: int


class Follow(msgspec.Struct, frozen=True, array_like=True, tag="follow"):
    """Send KV events under this number, a snapshot first."""

    feed: int


class Unfollow(msgspec.Struct, frozen=True, array_like=True, tag="unfollow"):
    """Send no more of them."""

    feed: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Stop the engine; answered with `Stopped`."""


Command = Start | Generate | Cancel | Follow | Unfollow | Stop


class Commands(msgspec.Struct, frozen=True, array_like=True):
    """What the replica asked for in one event-loop turn, in order."""

    items: tuple[Command, ...]


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """An exception of `serve.errors`: class name and constructor arguments."""

    kind: str
    args: tuple[str | int | float | None, ...]


class Started(msgspec.Struct, frozen=True, array_like=True, tag="started"):
    """The engine can generate."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine did not start, or the replica was refused."""

    error: WireError


class Stopped(msgspec.Struct, frozen=True, array_like=True, tag="stopped"):
    """The engine has released everything."""


Answer = Started | Failed | Stopped


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What happened at the host in one event-loop turn.

    Attributes:
        deltas, errors: Of sequences, by the number in `Generate`; an error is the last of its sequence.
        kv: KV events, by the number in `Follow`.
        taken: How many `Generate` commands `stats` knows of, counted from the first.
        stats: The load, as `stats_to_wire` makes it; None if it is not known yet.
        dead: Why the engine can make no progress any more; None while it can, and before it has started.
        beat: Set twice a second, whatever else there is to tell.
        answer: To `Start` or `Stop`.
    """

    deltas: tuple[tuple[int, TokenDelta], ...] = ()
    errors: tuple[tuple[int, WireError], ...] = ()
    kv: tuple[tuple[int, KvEventBatch], ...] = ()
    taken: int = 0
    stats: tuple[int | float, ...] | None = None
    dead: str | None = None
    beat: bool = False
    answer: Answer | None = None


_encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_commands = msgspec.msgpack.Decoder(Commands).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def pack(message: Hello | Commands | Report) -> bytes:
    """Encode a message as it goes on the wire."""
    return frame(_encode(message))


_stats_fields = attrgetter(*EngineStats.__dataclass_fields__)


def stats_to_wire(stats: EngineStats) -> tuple[int | float, ...]:
    """Return the fields in their order: names would be most of a frame."""
    fields: tuple[int | float, ...] = _stats_fields(stats)
    return fields


def stats_from_wire(fields: tuple[int | float, ...]) -> EngineStats:
    """Rebuild the statistics."""
    return EngineStats(*fields)  # type: ignore[arg-type]  # each field keeps its type on the wire


_ERRORS: dict[str, type[RayTRTError]] = {
    error.__name__: error
    for error in (RequestError, ContextTooLong, Overloaded, EngineDead, StreamLost, BundleMismatch, ConfigError)
}


def error_to_wire(error: Exception) -> WireError:
    """Encode an exception; one that is not of `serve.errors` becomes EngineDead, as nothing is known of its cause."""
    kind = type(error).__name__
    if type(error) is not _ERRORS.get(kind):
        return WireError("EngineDead", (f"internal error of the engine: {kind}: {error}",))
    if all(isinstance(arg, str | int | float | None) for arg in error.args):
        return WireError(kind, error.args)
    return WireError(kind, tuple(arg if isinstance(arg, str | int | float | None) else str(arg) for arg in error.args))


def error_from_wire(wire: WireError) -> RayTRTError:
    """Rebuild the exception."""
    return _ERRORS[wire.kind](*wire.args)
