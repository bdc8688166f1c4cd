"""Whether MPI can start processes here: `MPI_Comm_spawn`, tried for real in a process of its own, with a time limit.

It cannot be told from versions: images ship Open MPI builds whose spawn fails at once, or hangs. TensorRT-LLM starts
its ranks by it, so that the answer decides about the orchestrator.
"""

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.orchestration import engine_environ

logger = logging.getLogger(__name__)

PROBE_LIMIT_S = 30.0
_MARK = "RAYTRT_MPI_PROBE"
_ANSWER = "spawned 2"
_CHILD = "from mpi4py import MPI; p = MPI.Comm.Get_parent(); p.gather(p.rank, root=0); p.Disconnect()"
# Two at once: one process is no proof that there are slots for a rank on each GPU.
_PROGRAM = f"""
import sys
from mpi4py import MPI
children = MPI.COMM_SELF.Spawn(sys.executable, args=["-c", {_CHILD!r}], maxprocs=2)
ranks = children.gather(None, root=MPI.ROOT)
children.Disconnect()
print("spawned", len(ranks), flush=True)
"""


def mpi_spawns(limit_s: float = PROBE_LIMIT_S) -> bool:
    """Return whether MPI can start processes on this node, in the environment of this process. Blocks for seconds.

    Args:
        limit_s: A spawn that takes longer does not work.
    """
    reason = why_mpi_does_not_spawn(limit_s)
    if reason is not None:
        logger.info("MPI cannot start processes here: %s", reason)
    return reason is None


def why_mpi_does_not_spawn(limit_s: float = PROBE_LIMIT_S) -> str | None:
    """Return why MPI cannot start processes on this node; None if it can. Leaves no process behind."""
    mark = secrets.token_hex(8)
    environ = _environ(os.environ) | {_MARK: mark}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"MPI_Comm_spawn did not return within {limit_s:.0f} s"
    finally:
        _kill_marked(mark)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if _ANSWER in output:
        return None
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip(" -")), "no output")
    return f"exit status {process.returncode}: {last}"


def _environ(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that an engine would be started in."""
    changes = engine_environ("mpi", ParallelLayout(tensor=2), inherited)
    environ = {name: value for name, value in inherited.items() if name not in changes}
    return environ | {name: value for name, value in changes.items() if value is not None}


def _kill_marked(mark: str) -> None:
    """Kill whatever carries the mark: Open MPI's daemon and its children leave the session of who started them."""
    line = f"{_MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and line in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                os.kill(int(entry), signal.SIGKILL)
