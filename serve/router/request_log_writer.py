"""RequestLogWriter: LoggedRequests -> lines of a file that is rotated by size. The event loop never waits for the disk.

Lines are collected for a moment and written by a thread. What the disk cannot keep up with is dropped and counted.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serve.core.request_log import LoggedRequest, RequestLogFormat

logger = logging.getLogger(__name__)

FLUSH_S = 0.5  # a line is on disk so long after its request has ended, at most
MAX_WAITING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LogTarget:
    """Where to write.

    Attributes:
        path: Of the newest file. Older ones have .1, .2, ... behind it.
        max_bytes: A file that would become longer is put behind the newest.
        max_files: How many there are at most, with the newest.
    """

    path: Path
    max_bytes: int
    max_files: int


class RotatedFile:
    """A file that lines are appended to. It blocks; one thread at a time uses it."""

    def __init__(self, target: LogTarget) -> None:
        self._target = target
        self._file: IO[bytes] | None = None
        self._torn = False

    def append(self, lines: bytes) -> None:
        """Write whole lines.

        Raises:
            OSError: They were not written, or not all of them.
        """
        if self._file is None:
            self._target.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._target.path.open("ab")
        if self._file.tell() and self._file.tell() + len(lines) > self._target.max_bytes:
            self._rotate()
        try:
            self._file.write(b"\n" + lines if self._torn else lines)
            self._file.flush()
        except OSError:
            self._torn = True  # perhaps in the middle of a line: the next must not continue it
            raise
        self._torn = False

    def close(self) -> None:
        """Close it; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rotate(self) -> None:
        self.close()
        path, files = self._target.path, self._target.max_files
        for number in range(files - 1, 0, -1):
            older = path if number == 1 else _numbered(path, number - 1)
            if older.exists():
                older.replace(_numbered(path, number))
        self._file = path.open("wb" if files == 1 else "ab")


class RequestLogWriter:
    """Writes the log of one gateway process. One event loop uses it; closed, it costs nothing.

    Attributes:
        dropped: Requests that were not written.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._format = RequestLogFormat()
        self._open: _OpenLog | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def is_open(self) -> bool:
        """Whether requests are written."""
        return self._open is not None

    def set_target(self, target: LogTarget | None) -> None:
        """Write there from now on; None: nowhere. Lines that were taken before go where they belong."""
        if (self._open.target if self._open is not None else None) == target:
            return
        if self._open is not None:
            self._open.stop.set()
            self._open = None
        if target is not None:
            self._open = _OpenLog(target)
            task = asyncio.get_running_loop().create_task(self._open.run(self._lost))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def write(self, request: LoggedRequest) -> None:
        """Take a request; returns at once."""
        if self._open is not None and not self._open.take(self._format.encode(request)):
            self._lost(1, "the disk is too slow")

    async def close(self) -> None:
        """Write what was taken."""
        self.set_target(None)
        if self._ending:
            await asyncio.wait(self._ending)

    def _lost(self, requests: int, reason: str) -> None:
        if not self.dropped:
            logger.warning("Requests are missing in the request log: %s.", reason)
        self.dropped += requests


class _OpenLog:
    """Lines on their way to one target."""

    def __init__(self, target: LogTarget) -> None:
        self.target = target
        self.stop = asyncio.Event()
        self._file = RotatedFile(target)
        self._lines: list[bytes] = []
        self._waiting_bytes = 0

    def take(self, line: bytes) -> bool:
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            return False
        self._lines.append(line)
        self._waiting_bytes += len(line)
        return True

    async def run(self, lost: Callable[[int, str], None]) -> None:
        """Write until `stop`, and then what is left."""
        while self._lines or not self.stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self.stop.wait()
            lines, self._lines, self._waiting_bytes = self._lines, [], 0
            if lines:
                try:
                    await asyncio.to_thread(self._file.append, b"".join(lines))
                except OSError as exc:
                    lost(len(lines), str(exc))
        await asyncio.to_thread(self._file.close)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
