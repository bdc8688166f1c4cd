"""Frames: what one replica tells one gateway about all of its sequences after one engine step.

On the wire a frame (`serve.core.framing`) has a msgpack body. The first frame of a connection is a `Hello`.
"""

import msgspec

from serve.core.framing import frame
from serve.core.request import TokenDelta
from serve.errors import ContextTooLong, EngineDead, Overloaded, RayTRTError, RequestError, StreamLost

MAX_HELLO_BYTES = 1024


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Opens a connection. `secret` is the one that the gateway put into its reply addresses."""

    secret: str
    replica_id: str


class StreamError(msgspec.Struct, frozen=True, array_like=True):
    """An exception of `serve.errors` on its way to the gateway: class name and constructor arguments."""

    kind: str
    args: tuple[str | int | float | None, ...]


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Deltas and errors, each with the number that the gateway gave to its stream."""

    deltas: tuple[tuple[int, TokenDelta], ...] = ()
    errors: tuple[tuple[int, StreamError], ...] = ()


class ReplyAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the deltas of one sequence have to go; the gateway puts it into `GenerateRequest.reply_to`.

    Attributes:
        host, port: The gateway's listener, as reachable from other nodes.
        secret: Proves to the listener that the connection comes from one of its replicas.
        stream: Number of the sequence on that gateway.
    """

    host: str
    port: int
    secret: str
    stream: int

    def to_text(self) -> str:
        """Return the address as text without spaces."""
        return f"{self.host}|{self.port}|{self.secret}|{self.stream}"

    @classmethod
    def from_text(cls, text: str) -> "ReplyAddress":
        """Parse `to_text`'s result; raises ValueError if it is none."""
        host, port, secret, stream = text.split("|")
        return cls(host, int(port), secret, int(stream))


_encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode


def pack(message: Hello | Frame) -> bytes:
    """Encode a message with its length in front."""
    return frame(_encode(message))


_ERRORS: dict[str, type[RayTRTError]] = {
    error.__name__: error for error in (RequestError, ContextTooLong, Overloaded, EngineDead, StreamLost)
}


def error_to_wire(error: RayTRTError) -> StreamError:
    """Encode an exception; what is not a request's or an engine's fault becomes EngineDead."""
    kind = type(error).__name__
    if kind not in _ERRORS:
        return StreamError("EngineDead", (f"{kind}: {error}",))
    return StreamError(kind, error.args)


def error_from_wire(wire: StreamError) -> RayTRTError:
    """Rebuild the exception."""
    return _ERRORS[wire.kind](*wire.args)
