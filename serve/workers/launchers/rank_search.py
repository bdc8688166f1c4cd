"""Find the processes that an engine started for its ranks: by the group's mark, which they have inherited.

TensorRT-LLM does not tell their process ids. MPI ranks carry their number in their environment; Ray names its workers
`ray::Class`, and they are numbered in the order of their creation.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve.workers.processes import GROUP_VARIABLE, GroupMark, marked_processes

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_RAY_TITLE = b"ray::"
_IDLE_TITLE = b"ray::IDLE"  # waits for work of the same runtime environment, and may be ended by Ray at any time
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class FoundProcess:
    """A process of this machine.

    Attributes:
        pid: Its id.
        created_s: When it was created (`psutil.Process.create_time`).
        rank: Its number, if its environment tells.
    """

    pid: int
    created_s: float
    rank: int | None = None


def group_of_this_process() -> str:
    """Return the id of the group whose mark this process hands on.

    Raises:
        LookupError: There is none.
    """
    text = os.environ.get(GROUP_VARIABLE)
    if text is None:
        raise LookupError(f"{GROUP_VARIABLE} is not set: a launcher belongs to a WorkerGroup")
    return GroupMark.from_text(text).group


def mpi_ranks(group: str) -> list[FoundProcess]:
    """Return the ranks that MPI spawned for a group, in rank order. Blocks for milliseconds."""
    found = [process for pid in _members(group) if (process := _found(pid)) is not None and process.rank is not None]
    return sorted(found, key=lambda process: (process.rank or 0, process.created_s))


def ray_ranks(group: str) -> list[FoundProcess]:
    """Return the Ray workers of a group on this Ray node, oldest first. Blocks for milliseconds.

    Several Ray nodes may share a machine; workers of one are children of one raylet, as this process is if it is one.
    """
    raylet = os.getppid() if _is_ray_worker(os.getpid()) else None
    found = [
        process
        for pid in _members(group)
        if _is_ray_worker(pid) and _has_parent(pid, raylet) and (process := _found(pid)) is not None
    ]
    return sorted(found, key=lambda process: process.created_s)


def is_running(process: FoundProcess) -> bool | None:
    """Whether a process runs: False if it is stopped, None if it is gone."""
    with suppress(psutil.Error):
        there = psutil.Process(process.pid)
        if abs(there.create_time() - process.created_s) < 1.0 and (status := there.status()) not in _GONE:
            return status not in _STOPPED
    return None


def still_there(processes: Iterable[FoundProcess]) -> list[FoundProcess]:
    """Return those that are not gone."""
    return [process for process in processes if is_running(process) is not None]


def kill(processes: Sequence[FoundProcess]) -> None:
    """Kill processes, unless their ids are others' by now."""
    for process in still_there(processes):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def _members(group: str) -> Iterator[int]:
    for pid in marked_processes(lambda mark: mark.group == group):
        if pid != os.getpid():
            yield pid


def _found(pid: int) -> FoundProcess | None:
    with suppress(psutil.Error, OSError):
        environ = _environ(pid)
        rank = next((int(environ[name]) for name in _RANK_VARIABLES if environ.get(name, "").isdigit()), None)
        return FoundProcess(pid, psutil.Process(pid).create_time(), rank)
    return None


def _environ(pid: int) -> Mapping[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _is_ray_worker(pid: int) -> bool:
    with suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        return title.startswith(_RAY_TITLE) and not title.startswith(_IDLE_TITLE)
    return False


def _has_parent(pid: int, parent: int | None) -> bool:
    with suppress(psutil.Error):
        return parent is None or psutil.Process(pid).ppid() == parent
    return False
