"""RankWatch: the rank processes of this node, seen from outside: their death at once, and whether they are stopped."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve.workers.launchers.port import RankProcess

logger = logging.getLogger(__name__)


@dataclass
class _Watched:
    process: RankProcess
    pidfd: int


class RankWatch:
    """Watches processes by pidfd, on the running event loop.

    Args:
        died: Called with rank and reason, once.
    """

    def __init__(self, died: Callable[[int, str], None]) -> None:
        self._died = died
        self._watched: dict[int, _Watched] = {}
        self._loop = asyncio.get_running_loop()

    def add(self, process: RankProcess) -> None:
        """Watch a rank of this node; one that is dead already is told as such."""
        self.remove(process.rank)
        if sys.platform != "linux":
            return  # there are no pidfds; what can beat is watched by that
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._loop.call_soon(self._died, process.rank, f"process {process.pid} is dead")
            return
        except OSError as exc:
            logger.warning("Rank %d (process %d) is not watched from outside: %s", process.rank, process.pid, exc)
            return
        self._watched[process.rank] = _Watched(process, pidfd)
        self._loop.add_reader(pidfd, self._end, process.rank)

    def ranks(self) -> set[int]:
        """Return the ranks that are watched and have not died."""
        return set(self._watched)

    def running(self) -> list[int]:
        """Return the ranks that are neither dead nor stopped (by SIGSTOP, a debugger, or a freezer)."""
        return [rank for rank, watched in self._watched.items() if _state(watched.process.pid) not in ("T", "t", "")]

    def remove(self, rank: int) -> None:
        """Do not watch a rank any more."""
        watched = self._watched.pop(rank, None)
        if watched is not None:
            self._loop.remove_reader(watched.pidfd)
            os.close(watched.pidfd)

    def close(self) -> None:
        """Watch nothing any more. Safe to call twice."""
        for rank in list(self._watched):
            self.remove(rank)

    def _end(self, rank: int) -> None:
        pid = self._watched[rank].process.pid
        self.remove(rank)
        self._died(rank, f"process {pid} died")


def _state(pid: int) -> str:
    """Return the state letter of proc(5); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
