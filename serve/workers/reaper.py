"""The reaper: waits for its owner's death, then kills every process that carries the owner's mark.

Run by path, by `serve.workers.processes.Reaper`, with the interpreter's own library only, so that it is small (8 MB)
and starts in 20 ms. It leaves its parent and its session, so that nothing that ends the owner ends it, and it ignores
SIGTERM: it ends by itself as soon as nobody needs it.

Arguments: group, rank or nothing, the owner's process id and start (clock ticks), lease in seconds or nothing.
Stdin: `.` renews the lease, `q` dismisses. Stdout: its process id, once it is on watch.
"""

import contextlib
import os
import select
import signal
import sys
import time

_KILL_POLL_S = 0.02
_GIVE_UP_S = 60.0  # a process that cannot be killed waits for the kernel; the next start of a group looks again


def main(group: str, rank: str, owner: int, owner_started: int, lease_s: float | None) -> None:
    """Watch, and act."""
    if os.fork():
        os._exit(0)  # the owner waits for this one only; the other is a child of nobody, and in a session of its own
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("0")  # Ray makes its workers the first victims when memory runs out; this is not one of them
    watched = _open_owner(owner, owner_started)
    print(os.getpid(), flush=True)
    os.close(1)
    if watched is not None and _dismissed(watched, lease_s):
        return
    _kill_all(group, rank)


def _open_owner(owner: int, owner_started: int) -> int | None:
    """Return a descriptor that is readable once the owner is dead; None if it is already."""
    try:
        watched = os.pidfd_open(owner)
        with open(f"/proc/{owner}/stat") as file:
            started = int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return watched if started == owner_started else None


def _dismissed(watched: int, lease_s: float | None) -> bool:
    """Wait; return whether it ended in order, rather than by the owner's death or a lease that ran out."""
    inputs = [watched, 0]
    while True:
        readable, _, _ = select.select(inputs, [], [], lease_s)
        if watched in readable:
            return False
        if 0 in readable:
            words = os.read(0, 4096)
            if b"q" in words:
                return True
            if not words:
                inputs.remove(0)  # closed, and yet the owner lives: it may have closed everything; its death decides
        elif lease_s is not None and not readable:
            return False


def _kill_all(group: str, rank: str) -> None:
    deadline_s = time.monotonic() + _GIVE_UP_S
    mark = f"RAYTRT_GROUP={group}/{rank}{'/' if rank else ''}".encode()
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < deadline_s:  # a process that was just forked carries no mark yet
        alive = [pid for pid in _processes() if _carries(pid, mark)]
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        empty_looks = 0 if alive else empty_looks + 1
        time.sleep(_KILL_POLL_S)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _carries(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return any(variable.startswith(mark) for variable in file.read().split(b"\0"))
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]) if sys.argv[5] else None)
