"""Retry: try again what a network or a busy storage failed to do, a little later each time."""

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from serve.errors import RayTRTError, StoreUnavailable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# What will not be better the next time: answers, mistakes in the program, a full or read-only disk.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT}
_FINAL_ERRNO = _FULL_ERRNO | {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV}


@dataclass(frozen=True)
class Retry:
    """How often, and how long between.

    Attributes:
        attempts: In all.
        first_s: Before the second one; doubled each time, up to `longest_s`, and shortened by up to half at random, so
            that many clients of an overloaded storage do not come back together.
    """

    attempts: int = 6
    first_s: float = 0.2
    longest_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep
    random: Random = field(default_factory=Random)

    def run(self, what: str, action: Callable[[], _T]) -> _T:
        """Do something that may be done twice.

        Args:
            what: For messages: what could not be done, and where.
            action: Does it.

        Raises:
            StoreUnavailable: What the last attempt, or one that cannot be mended, ended with, if it is no error of
            ours.
        """
        delay_s = self.first_s
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except RayTRTError:
                raise
            except Exception as exc:
                if attempt == self.attempts or is_final(exc):
                    raise StoreUnavailable(f"{what}: {describe(exc)}") from exc
                _log.info("%s: %s; trying again (%d of %d)", what, describe(exc), attempt + 1, self.attempts)
                self.sleep(delay_s * (1 - self.random.random() / 2))
                delay_s = min(delay_s * 2, self.longest_s)
        raise AssertionError("unreachable")


def is_final(exc: BaseException) -> bool:
    """Return whether trying again cannot help."""
    return isinstance(exc, _FINAL) or (isinstance(exc, OSError) and exc.errno in _FINAL_ERRNO)


def is_disk_full(exc: BaseException | None) -> bool:
    """Return whether an error, or what led to it, is a full disk."""
    return exc is not None and ((isinstance(exc, OSError) and exc.errno in _FULL_ERRNO) or is_disk_full(exc.__cause__))


def describe(exc: BaseException) -> str:
    """Return an exception in one line, never empty."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
