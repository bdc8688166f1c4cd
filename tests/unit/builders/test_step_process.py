"""The process of a step: its time, its log, its progress, and that nothing outlives it."""

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from builders.progress import Progress, ProgressBoard, Reporter
from builders.step_log import read_tail
from builders.step_process import OverTime, time_limit

WAIT_S = 30.0


def test_a_block_that_takes_too_long_is_interrupted() -> None:
    with pytest.raises(OverTime, match=r"longer than target.time_limit_s: 0\.05"), time_limit(0.05):
        threading.Event().wait(WAIT_S)


def test_what_takes_every_exception_does_not_take_this_one() -> None:
    with pytest.raises(OverTime), time_limit(0.05):
        _try_for_ever()


def _try_for_ever() -> None:
    while True:
        with contextlib.suppress(Exception):
            threading.Event().wait(WAIT_S)


def test_a_block_that_ends_in_time_leaves_nothing_behind() -> None:
    with time_limit(WAIT_S):
        pass
    with pytest.raises(OverTime), time_limit(0.01):  # and can be followed by another
        threading.Event().wait(WAIT_S)


def test_the_tail_is_what_a_terminal_would_show(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"\r".join(b"%d %%" % share for share in range(100)) + b"\n\nbroken \xff\nlast")
    assert read_tail(log, 3) == ("99 %", "broken \ufffd", "last")
    assert read_tail(tmp_path / "none") == ()


PROGRAM = """
import logging, subprocess, sys, warnings
from pathlib import Path
from builders.step_log import take_over_output
print("before")
take_over_output(Path(sys.argv[1]))
print("printed")
print("to stderr", file=sys.stderr)
logging.getLogger("a.library").warning("logged")
subprocess.run(["sh", "-c", "echo by a child"])
"""


def test_everything_that_a_step_prints_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs/step.log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(log)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\n", "")
    text = log.read_text()
    for line in ("printed", "to stderr", "WARNING a.library: logged", "by a child"):
        assert line in text


ORPHANS = """
import os, subprocess, sys
from builders.step_process import no_orphans
from builders.step_order import StepOrder
from builders.context import StepName
order = StepOrder("b", StepName.COMPILE, "f" * 64, {}, {}, "s", {})
with no_orphans(order):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(child.pid, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="marks are to be found on Linux only")
@pytest.mark.parametrize("end", ["in order", "killed"])
def test_no_process_that_a_step_started_outlives_it(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS, end], stdout=subprocess.PIPE, text=True)
    assert done.returncode == (-9 if end == "killed" else 0)
    pid = int(done.stdout)
    deadline_s = time.monotonic() + WAIT_S
    while _is_alive(pid):
        assert time.monotonic() < deadline_s, "it is still there"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Board:
    """A handle of a board, whose calls arrive at once."""

    def __init__(self) -> None:
        self.board = ProgressBoard()
        self.arrived = threading.Event()
        self.tell = SimpleNamespace(remote=self._tell)

    def _tell(self, step: str, progress: Progress) -> None:
        self.board.tell(step, progress)
        if progress.done == progress.total:
            self.arrived.set()


def test_a_reporter_sends_the_last_word_only() -> None:
    board = Board()
    reporter = Reporter(lambda: board, "tune")
    for done in range(10_001):
        reporter(done, 10_000, "trial")
    assert board.arrived.wait(WAIT_S)
    reporter.close()
    assert board.board.read() == {"tune": Progress(10_000, 10_000, "trial")}


def test_a_board_that_comes_late_hears_the_last_word() -> None:
    board = Board()
    found = iter([None])
    reporter = Reporter(lambda: next(found, board), "tune")
    reporter(2, 2)
    assert board.arrived.wait(WAIT_S)
    reporter.close()


def test_nobody_has_to_listen() -> None:
    reporter = Reporter(lambda: None, "tune")
    reporter(1, 2)
    reporter.close()
