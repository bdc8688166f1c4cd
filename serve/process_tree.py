"""Leave no process behind: what this process started, and what those started, ends with it."""

import contextlib
import ctypes
import signal
import sys

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that `end_descendants` finds them. Linux only.

    A HAProxy whose supervising actor was killed would otherwise keep the port for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def interrupt_with_parent() -> None:
    """Have this process interrupted when its parent dies, however that is; for a child before `exec`. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def end_descendants(grace_s: float = 3.0) -> list[str]:
    """Terminate every descendant, and kill those that are still there after `grace_s`; returns their names."""
    ended = []
    # Killing a parent may bring up new orphans: go on until there is none.
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                ended.append(process.name())
                process.terminate()
        _, alive = psutil.wait_procs(descendants, timeout=grace_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=grace_s)
    return ended
