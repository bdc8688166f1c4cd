"""Progress: one line on a terminal that says how far a simulation is."""

import sys
import time
from typing import TextIO

_EVERY_S = 0.2


class Progress:
    """Tells a terminal, and nobody else.

    Args:
        stream: Where to write; None, or one that is no terminal: nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._label = ""
        self._requests = 0
        self._began_s = self._told_s = 0.0

    def started(self, label: str, requests: int) -> None:
        """A simulation of so many requests begins."""
        self._label, self._requests, self._began_s = label, requests, time.monotonic()

    def advanced(self, requests: int, virtual_s: float) -> None:
        """So many requests have arrived, at this virtual time."""
        now_s = time.monotonic()
        if self._stream is not None and now_s - self._told_s >= _EVERY_S:
            self._told_s = now_s
            self._write(
                f"{self._label}: {requests}/{self._requests} requests, {virtual_s:.0f} s of traffic in "
                f"{now_s - self._began_s:.0f} s"
            )

    def finished(self, done: int, count: int, label: str = "") -> None:
        """So many of several simulations have ended, the last one with this label."""
        self._write(f"{done}/{count} simulations{label and f', the last one {label}'}")

    def close(self) -> None:
        """Clear the line."""
        self._write("")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(f"\r\033[K{text}")
            self._stream.flush()


def terminal_progress() -> Progress:
    """Return one for this process's standard error."""
    return Progress(sys.stderr)
