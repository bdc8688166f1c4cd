"""DeltaSender: the replica's end. One connection to each gateway, one frame an event-loop turn for all its streams."""

import asyncio
import logging
import socket
from typing import cast

from serve.core.request import TokenDelta, merge_deltas
from serve.datapath.frames import Frame, Hello, ReplyAddress, StreamError, error_to_wire, pack
from serve.errors import EngineDead, RayTRTError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0


class _GatewayLink(asyncio.Protocol):
    """An open connection to one gateway, and what waits for the end of this event-loop turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._deltas: dict[int, TokenDelta] = {}
        self._errors: dict[int, StreamError] = {}
        self._flush_is_due = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports inherit from no such class
        # A frame is small, and the next one a step away: Nagle's algorithm would hold it back for up to 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def hello(self, message: Hello) -> None:
        self._write(pack(message))

    def send(self, stream: int, delta: TokenDelta) -> None:
        queued = self._deltas.get(stream)
        self._deltas[stream] = delta if queued is None else merge_deltas(queued, delta)
        self._flush_soon()

    def send_error(self, stream: int, error: StreamError) -> None:
        self._errors[stream] = error
        self._flush_soon()

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush_soon(self) -> None:
        # An engine step wakes all its streams in one turn of the loop; the callback runs after the last of them.
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._deltas or self._errors:
            self._write(pack(Frame(tuple(self._deltas.items()), tuple(self._errors.items()))))
            self._deltas.clear()
            self._errors.clear()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self.lost:
            self._transport.write(data)


class DeltaSender:
    """Connections from one replica to the gateways that sent it requests; opened on demand and kept.

    Args:
        replica_id: Told to the gateway, for its log.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._links: dict[tuple[str, int, str], asyncio.Task[_GatewayLink]] = {}

    async def open(self, address: ReplyAddress) -> "ReplyStream":
        """Return the way back for one sequence.

        Raises:
            EngineDead: The gateway cannot be reached from this node.
        """
        key = (address.host, address.port, address.secret)
        task = self._links.get(key)
        if task is None or (task.done() and _usable(task) is None):
            task = asyncio.get_running_loop().create_task(self._connect(address))
            self._links[key] = task
        try:
            link = await asyncio.shield(task)
        except OSError as exc:
            if self._links.get(key) is task:
                del self._links[key]
            raise EngineDead(
                f"replica {self._replica_id} cannot connect to the gateway at {address.host}:{address.port} ({exc}); "
                "nodes of a cluster must reach each other on all ports"
            ) from exc
        return ReplyStream(link, address.stream)

    async def _connect(self, address: ReplyAddress) -> _GatewayLink:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, link = await loop.create_connection(lambda: _GatewayLink(loop), address.host, address.port)
        link.hello(Hello(address.secret, self._replica_id))
        # Gateways come and go; a link that was lost is only in the way.
        for key, task in list(self._links.items()):
            if task.done() and _usable(task) is None:
                del self._links[key]
        return link

    def close(self) -> None:
        """Send what is queued and close every connection."""
        for task in self._links.values():
            if link := _usable(task):
                link.close()
        self._links.clear()


def _usable(task: asyncio.Task[_GatewayLink]) -> _GatewayLink | None:
    """Return the link that a task has opened, unless it failed, or the link was lost since."""
    if not task.done() or task.cancelled() or task.exception() is not None:
        return None
    link = task.result()
    return None if link.lost else link


class ReplyStream:
    """The way back to the gateway for one sequence."""

    def __init__(self, link: _GatewayLink, stream: int) -> None:
        self._link = link
        self._stream = stream

    @property
    def lost(self) -> bool:
        """Whether the gateway is gone; nobody waits for this sequence any more."""
        return self._link.lost

    def send(self, delta: TokenDelta) -> None:
        """Queue a delta; it leaves at the end of this event-loop turn, with those of the other streams."""
        self._link.send(self._stream, delta)

    def send_error(self, error: RayTRTError) -> None:
        """Queue an error, which ends the stream."""
        self._link.send_error(self._stream, error_to_wire(error))
