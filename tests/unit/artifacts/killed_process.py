"""Processes that are killed, really, at one of their operations on files.

Python tells of each (`sys.addaudithook`); the process counts them, and ends itself by SIGKILL at the one that is asked
for, before it takes place.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.forks import fork_server

# Those that change something; to be killed before one that does not is to be killed before the next one that does. A
# directory that is made, mostly is there already, and means nothing while it is empty.
_OPERATIONS = {
    "os.chmod",
    "os.link",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.utime",
}


def run_killed(action: Callable[..., None], arguments: tuple[Any, ...], place: str, operation: int) -> bool:
    """Run something in a process of its own that is killed at an operation.

    Args:
        action: A function of a module.
        arguments: Of it.
        place: Operations on paths that begin like this count, others do not.
        operation: Which one, counted from 0.

    Returns:
        Whether it got that far; if not, it ended by itself.
    """
    process = fork_server().Process(target=_run, args=(action, arguments, place, operation))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"{action.__name__} failed: see its output")
    return process.exitcode != 0


def _run(action: Callable[..., None], arguments: tuple[Any, ...], place: str, operation: int) -> None:
    left = operation

    def count(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        is_write = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if not (is_write or event in _OPERATIONS) or not _is_below(values, place):
            return
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    action(*arguments)


def _is_below(values: tuple[Any, ...], place: str) -> bool:
    return any(os.fspath(value).startswith(place) for value in values if isinstance(value, str | os.PathLike))
