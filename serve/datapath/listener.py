"""DeltaListener: the gateway's end. Accepts replicas' connections and hands each stream its deltas, merged."""

import asyncio
import logging
import secrets
import socket
from typing import cast

import msgspec

from serve.core.request import TokenDelta, merge_deltas
from serve.datapath.frames import Frame, FrameReader, ReplyAddress, decode_frame, decode_hello, error_from_wire
from serve.errors import EngineDead, RayTRTError

logger = logging.getLogger(__name__)


class DeltaStream:
    """Deltas of one sequence on their way to its client. At most one is queued: later ones are merged into it."""

    def __init__(self) -> None:
        self.replica_id: str | None = None
        self.closed = False
        self._queued: TokenDelta | None = None
        self._error: RayTRTError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        """Add what came after the queued delta."""
        self._queued = delta if self._queued is None else merge_deltas(self._queued, delta)
        self._wake()

    def fail(self, error: RayTRTError) -> None:
        """End the stream with `error`, after what is queued; only the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def next(self) -> TokenDelta:
        """Wait for the next delta; raises the error that ended the stream."""
        while self._queued is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta, self._queued = self._queued, None
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


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

    @property
    def open_streams(self) -> int:
        """Sequences that are waiting for deltas."""
        return len(self._streams)

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

    def accept(self, connection: "_ReplicaConnection", secret: str) -> bool:
        """Register a connection that said hello; False if it does not belong here."""
        if not secrets.compare_digest(secret, self._secret):
            return False
        self._connections.add(connection)
        return True

    def dispatch(self, frame: Frame, replica_id: str) -> None:
        """Hand the content of a frame to its streams."""
        streams = self._streams
        for number, delta in frame.deltas:
            stream = streams.get(number)
            if stream is not None:
                stream.replica_id = replica_id
                stream.push(delta)
        for number, error in frame.errors:
            stream = streams.get(number)
            if stream is not None:
                stream.fail(error_from_wire(error))

    def disconnected(self, connection: "_ReplicaConnection", replica_id: str) -> None:
        """Fail the streams of a replica whose connection broke."""
        self._connections.discard(connection)
        for stream in self._streams.values():
            if stream.replica_id == replica_id:
                stream.fail(EngineDead(f"the connection to replica {replica_id} was lost"))


class _ReplicaConnection(asyncio.Protocol):
    def __init__(self, listener: DeltaListener) -> None:
        self._listener = listener
        self._reader = FrameReader()
        self._replica_id: str | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports inherit from no such class
        # A replica's node that loses power sends no FIN: let the kernel find out.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                self._receive(body)
        except (ValueError, msgspec.DecodeError) as exc:
            peer = self._transport.get_extra_info("peername") if self._transport else None
            logger.warning("Dropping the connection from %s (%s): %s", self._replica_id or "unknown", peer, exc)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._replica_id is not None:
            self._listener.disconnected(self, self._replica_id)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _receive(self, body: bytes) -> None:
        if self._replica_id is not None:
            self._listener.dispatch(decode_frame(body), self._replica_id)
            return
        hello = decode_hello(body)
        if not self._listener.accept(self, hello.secret):
            raise ValueError("wrong secret")
        self._replica_id = hello.replica_id
