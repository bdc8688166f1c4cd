"""ProcessIdentity: which process holds something, so that others on its machine can see at once that it died."""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process.

    Attributes:
        host: For people.
        system: This boot of this machine, and the namespace that process numbers count in; empty: not known.
        pid: Its number there.
        started: When it started, in clock ticks since boot: numbers are used again.
    """

    host: str
    system: str
    pid: int
    started: int

    def is_surely_dead(self) -> bool:
        """Return whether it ended. False if it is of another machine, and nobody here can know."""
        if not self.system or self.system != _system():
            return False
        return _started(self.pid) != self.started

    def to_json(self) -> dict[str, Any]:
        """Return it as `from_json` reads it."""
        return {"host": self.host, "system": self.system, "pid": self.pid, "started": self.started}


def this_process() -> ProcessIdentity:
    """Return who we are."""
    pid = os.getpid()
    return ProcessIdentity(socket.gethostname(), _system(), pid, _started(pid) or 0)


def from_json(value: Any) -> ProcessIdentity:
    """Read what `to_json` wrote. What cannot be read is a process of a machine that nobody knows."""
    try:
        return ProcessIdentity(str(value["host"]), str(value["system"]), int(value["pid"]), int(value["started"]))
    except (KeyError, TypeError, ValueError):
        return ProcessIdentity("unknown", "", 0, 0)


@cache
def _system() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:  # not Linux: leases run out instead
        return ""


def _started(pid: int) -> int | None:
    """Return when a process started; None: there is none, or it ended and waits for its parent."""
    try:
        # The second field is the program's name in parentheses, which may contain anything.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
