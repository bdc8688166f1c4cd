"""Marks on the processes of a worker group, so that none outlives it, whoever started it and whatever its session.

Every process of a group carries `RAYTRT_GROUP` in the environment it was started with, which its children inherit and
`/proc/PID/environ` shows. The mark names the group, the rank, and the owner: the process whose death ends the rest. A
tiny reaper (`serve/workers/reaper.py`) of each owner kills what carries the mark when the owner dies; a starting group
kills what dead owners have left behind, should their reapers have died as well.

Linux only: elsewhere (a laptop, with an engine in its replica's process) no marks are to be found, and no reapers run.
"""

import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

GROUP_VARIABLE = "RAYTRT_GROUP"
_PREFIX = f"{GROUP_VARIABLE}=".encode()
_REAPER = Path(__file__).with_name("reaper.py")
_IS_LINUX = sys.platform == "linux"
_POLL_S = 0.02  # between two looks at processes that were killed and have not gone yet


@dataclass(frozen=True)
class GroupMark:
    """What `RAYTRT_GROUP` says.

    Attributes:
        group: Id of the group.
        rank: Which rank the process belongs to; None: to the group as a whole.
        machine: Boot and process namespace of the owner; process ids of another one say nothing.
        owner_pid: The owner's process id there.
        owner_started: When it was started, in clock ticks since boot, as process ids are used again.
    """

    group: str
    rank: int | None
    machine: str
    owner_pid: int
    owner_started: int

    def to_text(self) -> str:
        """Return the variable's value."""
        rank = "" if self.rank is None else str(self.rank)
        return f"{self.group}/{rank}/{self.machine}/{self.owner_pid}/{self.owner_started}"

    @classmethod
    def from_text(cls, text: str) -> "GroupMark":
        """Read the variable's value.

        Raises:
            ValueError: It is none.
        """
        group, rank, machine, pid, started = text.split("/")
        return cls(group, int(rank) if rank else None, machine, int(pid), int(started))

    @classmethod
    def of_this_process(cls, group: str) -> "GroupMark":
        """Return the mark of a group that this process owns."""
        pid = os.getpid()
        return cls(group, None, this_machine(), pid, start_ticks(pid) or 0)

    def for_rank(self, rank: int) -> "GroupMark":
        """Return the mark of one rank's processes."""
        return replace(self, rank=rank)

    def owner_is_gone(self) -> bool:
        """Whether the owner was a process of this machine, and is no more."""
        return self.machine == this_machine() and start_ticks(self.owner_pid) != self.owner_started


def marked_processes(wanted: Callable[[GroupMark], bool]) -> dict[int, GroupMark]:
    """Return the processes of this machine whose mark is wanted, and that are no zombies."""
    return {pid: mark for pid, mark in _all_marks() if wanted(mark)}


def kill_marked(wanted: Callable[[GroupMark], bool], limit_s: float) -> dict[int, GroupMark]:
    """Kill the processes whose mark is wanted, and wait until they are gone; a stopped one is killed as well.

    Looks again until there is none, twice in a row: a process may have started another one meanwhile, which carries
    the mark as soon as it runs its own program. A dying process loses its memory, and the mark with it, before it gives
    back devices and files, so each is waited for by its id as well. Blocks.

    Args:
        wanted: Says of a mark whether its process is to be killed.
        limit_s: When to stop waiting.

    Returns:
        Those that are alive all the same; empty if all is well.
    """
    deadline_s = time.monotonic() + limit_s
    killed: dict[int, tuple[GroupMark, int | None]] = {}
    empty_looks = 0
    while True:
        alive = marked_processes(wanted)
        alive.pop(os.getpid(), None)
        for pid, mark in alive.items():
            killed[pid] = mark, start_ticks(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        dying = {pid: mark for pid, (mark, started) in killed.items() if started and start_ticks(pid) == started}
        alive |= dying
        empty_looks = 0 if alive else empty_looks + 1
        if empty_looks == 2 or time.monotonic() > deadline_s:
            return alive
        time.sleep(_POLL_S)


def kill_group(group: str, limit_s: float) -> dict[int, GroupMark]:
    """Kill all processes of one group on this machine; see `kill_marked`."""
    return kill_marked(lambda mark: mark.group == group, limit_s)


def kill_stale_groups(limit_s: float) -> list[str]:
    """Kill what dead owners have left behind on this machine; returns the ids of their groups. Blocks."""
    stale = {mark.group for mark in marked_processes(GroupMark.owner_is_gone).values()}
    if stale:
        kill_marked(lambda mark: mark.group in stale and mark.owner_is_gone(), limit_s)
    return sorted(stale)


def start_reaper(mark: GroupMark, lease_s: float | None = None) -> "Reaper | None":
    """Start a reaper for what this process owns, where there can be one. Blocks for 50 ms."""
    return Reaper(mark, lease_s) if _IS_LINUX else None


class Reaper:
    """A process that kills what carries a mark when this process dies. Survives whatever kills this process.

    Args:
        mark: Whose processes; only its rank's, if it names one.
        lease_s: The reaper also acts if `renew` is not called for so long, for owners that depend on somebody
            elsewhere; None: it does not.
    """

    def __init__(self, mark: GroupMark, lease_s: float | None = None) -> None:
        pid = os.getpid()
        rank = "" if mark.rank is None else str(mark.rank)
        line = [mark.group, rank, str(pid), str(start_ticks(pid)), str(lease_s or "")]
        environ = {name: value for name, value in os.environ.items() if name != GROUP_VARIABLE}  # or it kills itself
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_REAPER), *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            start_new_session=True,
            close_fds=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._pipe = process.stdin
        os.set_blocking(self._pipe.fileno(), False)  # a reaper that does not read holds nobody up
        with process.stdout as answer:
            self.pid = int(answer.readline() or 0)  # it is on watch now, as a child of nobody
        process.wait()
        if not self.pid:
            logger.warning("Group %s has no reaper: if this process is killed, what it started may stay.", mark.group)

    def renew(self) -> None:
        """Say that all is well, where there is a lease."""
        self._say(b".")

    def dismiss(self) -> None:
        """Let it end without killing anything. Safe to call twice."""
        self._say(b"q")
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone, or the pipe is closed
            os.write(self._pipe.fileno(), word)


def start_ticks(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since boot; None if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command before may hold anything
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    # The first thread of a dying process is a zombie while others are still at the process's devices.
    return None if state in "ZX" and threads <= 1 else started


@cache
def this_machine() -> str:
    """Return what tells this machine, this boot and this process namespace from others."""
    if not _IS_LINUX:
        return platform.node()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"{boot}-{namespace}"


def _all_marks() -> Iterator[tuple[int, GroupMark]]:
    for entry in os.listdir("/proc") if _IS_LINUX else ():
        if not entry.isdigit():
            continue
        try:
            environ = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue  # gone, or somebody else's
        for variable in environ.split(b"\0"):
            if variable.startswith(_PREFIX):
                with contextlib.suppress(ValueError):
                    yield int(entry), GroupMark.from_text(variable[len(_PREFIX) :].decode())
                break
