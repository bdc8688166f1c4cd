"""ByteCount: adds up what several threads do, and tells."""

import threading

from serve.artifacts.port import ByteProgress


class ByteCount:
    """Bytes done of a known total, in parts (files, say) of which each has its own count.

    Args:
        total: In all.
        progress: Told after each change.
    """

    def __init__(self, total: int, progress: ByteProgress) -> None:
        self.total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._parts: dict[str, int] = {}
        self._done = 0

    def add(self, count: int, part: str = "") -> None:
        """Count more bytes of a part; fewer, if some have to be done again."""
        with self._lock:
            self._change(part, self._parts.get(part, 0) + count)

    def set(self, done: int, part: str = "") -> None:
        """Say how many bytes of a part are done."""
        with self._lock:
            self._change(part, done)

    def _change(self, part: str, done: int) -> None:
        self._done += done - self._parts.get(part, 0)
        self._parts[part] = done
        self._progress(self._done, self.total)
