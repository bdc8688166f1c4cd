"""FrameLink: one end of the socket, whichever; frames in, and out of each event-loop turn at most one frame."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

from serve.core.framing import MAX_FRAME_BYTES, FrameReader

logger = logging.getLogger(__name__)

MAX_UNWRITTEN_BYTES = 2**20  # what more there is waits where it is merged


class FrameLink(asyncio.Protocol):
    """An asyncio protocol that cuts and gathers frames.

    While the peer does not read, `compose` is not called: what it would have taken is merged where it waits.

    Args:
        receive: Called with the body of each frame; a ValueError or DecodeError of it ends the connection.
        compose: Called when there is something to send and room for it: returns the frame, or nothing.
        lost: Called once, when the connection has ended, with the reason.
        max_frame_bytes: Of received frames.
    """

    def __init__(
        self,
        receive: Callable[[bytes], None],
        compose: Callable[[], bytes | None],
        lost: Callable[[str], None],
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._receive = receive
        self._compose = compose
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._flush_is_due = False
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._reason = "the connection was closed by the other side"
        self.closed = asyncio.Event()

    def accept_frames_of(self, max_frame_bytes: int) -> None:
        """Set the longest frame that is accepted from now on."""
        self._reader.max_frame_bytes = max_frame_bytes

    def flush_soon(self) -> None:
        """Send what `compose` has, at the end of this turn: an engine step wakes all its sequences in one."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    async def room(self) -> None:
        """Wait until the peer has read enough of what was sent, or is gone."""
        await self._has_room.wait()

    @property
    def unwritten_bytes(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def write(self, data: bytes) -> None:
        """Send at once."""
        if self._transport is not None and not self.closed.is_set():
            self._transport.write(data)

    def close(self) -> None:
        """End the connection when what was written is sent."""
        self._reason = "the connection was closed"
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """End the connection now."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports inherit from no such class
        self._transport.set_write_buffer_limits(high=MAX_UNWRITTEN_BYTES)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            for body in self._reader.feed(data):
                self._receive(body)
        except (ValueError, msgspec.DecodeError) as exc:
            self.abort(f"the other side sent what cannot be understood: {exc}")

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._has_room.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._has_room.set()
        self.flush_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.closed.set()
        self._has_room.set()
        self._lost(f"{self._reason} ({exc})" if exc is not None else self._reason)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._has_room.is_set() and not self.closed.is_set():
            data = self._compose()
            if data is not None:
                self.write(data)
