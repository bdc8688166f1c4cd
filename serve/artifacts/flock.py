"""FileLock: a lock between the processes of one machine, which ends with the process that holds it, however it ends."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


class FileLock:
    """An advisory lock on a file of its own. Made by `take`; released by `release`, or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, *, shared: bool = False, wait: Callable[[], None] | None = None) -> Self:
        """Take a lock, as soon as nobody else holds it.

        Args:
            path: Of the file; made if it is not there.
            shared: Others may hold it too, if shared.
            wait: Called again and again while somebody else holds it; sleeps as long as it likes. None: the kernel
                waits.
        """
        while True:
            if wait is None:
                lock = cls._try(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            elif (lock := cls.try_take(path, shared=shared)) is None:
                wait()
            if lock is not None:
                return lock

    @classmethod
    def try_take(cls, path: Path, *, shared: bool = False) -> Self | None:
        """Take a lock, if nobody else holds it; None: somebody does."""
        return cls._try(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    @classmethod
    def _try(cls, path: Path, operation: int) -> Self | None:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, operation)
                # Whoever held it may have removed the file: what we locked is not what others will lock.
                if _is_same_file(descriptor, path):
                    return cls(descriptor)
                os.close(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise

    def release(self) -> None:
        """Give it back; safe to call twice."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked process has it open too
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
