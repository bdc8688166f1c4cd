"""Framing: messages on a byte stream, each with a 4-byte big-endian length in front of its body."""

import struct
from collections.abc import Iterator

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """Return a message as it goes on the wire."""
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into message bodies.

    Args:
        max_frame_bytes: Longer frames are refused; may be changed between two.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add received bytes and yield each body that is complete.

        Raises:
            ValueError: A length beyond `max_frame_bytes`: the peer speaks something else.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > self.max_frame_bytes:
                    raise ValueError(f"a frame of {length} bytes exceeds {self.max_frame_bytes}: not a raytrt peer")
                end = start + _LENGTH.size + length
                if end > len(self._buffer):
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del self._buffer[:start]
