"""DeltaListener: the gateway's end. Accepts replicas' connections and hands each stream its deltas, merged."""

import asyncio
import logging
import secrets
import socket
from typing import cast

import msgspec

from serve.core.delta_inbox import DeltaInbox
from serve.core.framing import MAX_FRAME_BYTES, FrameReader
from serve.datapath.frames import (
    MAX_HELLO_BYTES,
    Frame,
    ReplyAddress,
    decode_frame,
    decode_hello,
    error_from_wire,
)
from serve.errors import EngineDead

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0


class DeltaStream(DeltaInbox):
    """Deltas of one sequence on their way to its client."""

    def __init__(self) -> None:
        super().__init__()
        self.connection: _ReplicaConnection | None = None  # the one that its deltas come on
        self.closed = False

    @property
    def replica_id(self) -> str:
        """The replica that its deltas come from, as it calls itself; empty before the first."""
        return self.connection.replica_id or "" if self.connection is not None else ""


class DeltaListener:
    """A TCP listener for the deltas of all sequences of one gateway process.

    Args:
        host: The address that replicas connect to: this node's, as the cluster sees it.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_hex(16)
        self._streams: dict[int, DeltaStream] = {}
        self._next_stream = 0
        self._server: asyncio.Server | None = None
        self._connections: set[_ReplicaConnection] = set()

    async def start(self) -> None:
        """Listen on a free port of `host`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _ReplicaConnection(self), self._host, 0, backlog=1024)

    @property
    def port(self) -> int:
        """The port that `start` found."""
        assert self._server is not None, "start() comes first"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def open(self) -> tuple[ReplyAddress, DeltaStream]:
        """Make a stream for a new sequence, and the address that its replica has to send to."""
        self._next_stream += 1
        stream = self._streams[self._next_stream] = DeltaStream()
        return ReplyAddress(self._host, self.port, self._secret, self._next_stream), stream

    def close_stream(self, address: ReplyAddress) -> None:
        """Forget a stream; what still arrives for it is dropped."""
        self._streams.pop(address.stream, None)

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.abort()
            await self._server.wait_closed()

    def connected(self, connection: "_ReplicaConnection") -> None:
        """Remember a connection, so that it can be closed."""
        self._connections.add(connection)

    def is_ours(self, secret: str) -> bool:
        """Whether a peer knows what only our replicas have been told."""
        return secrets.compare_digest(secret.encode(), self._secret.encode())

    def dispatch(self, frame: Frame, connection: "_ReplicaConnection") -> None:
        """Hand the content of a frame to its streams."""
        streams = self._streams
        for number, delta in frame.deltas:
            stream = streams.get(number)
            if stream is not None:
                stream.connection = connection
                stream.push(delta)
        for number, error in frame.errors:
            stream = streams.get(number)
            if stream is not None:
                stream.fail(error_from_wire(error))

    def disconnected(self, connection: "_ReplicaConnection", replica_id: str | None) -> None:
        """Fail the streams of a connection that broke. The replica may have a newer one, with streams of its own."""
        self._connections.discard(connection)
        for stream in self._streams.values():
            if stream.connection is connection:
                stream.fail(EngineDead(f"the connection to replica {replica_id} was lost"))


class _ReplicaConnection(asyncio.Protocol):
    """A peer that has to say hello, soon and briefly, before anything is believed or kept for it."""

    def __init__(self, listener: DeltaListener) -> None:
        self._listener = listener
        self._reader = FrameReader(MAX_HELLO_BYTES)
        self.replica_id: str | None = None
        self._transport: asyncio.Transport | None = None
        self._hello_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports inherit from no such class
        # A replica's node that loses power sends no FIN: let the kernel find out.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._listener.connected(self)
        self._hello_timeout = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.abort)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._receive(body)
        except (ValueError, msgspec.DecodeError) as exc:
            peer = self._transport.get_extra_info("peername") if self._transport else None
            logger.warning("Dropping the connection from %s (%s): %s", self.replica_id or "unknown", peer, exc)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._hello_timeout is not None:
            self._hello_timeout.cancel()
        self._listener.disconnected(self, self.replica_id)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _receive(self, body: bytes) -> None:
        if self.replica_id is not None:
            self._listener.dispatch(decode_frame(body), self)
            return
        hello = decode_hello(body)
        if not self._listener.is_ours(hello.secret):
            raise ValueError("wrong secret")
        self.replica_id = hello.replica_id
        self._reader.max_frame_bytes = MAX_FRAME_BYTES
        if self._hello_timeout is not None:
            self._hello_timeout.cancel()
