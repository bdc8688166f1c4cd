"""Trials in processes of their own: an engine that runs out of memory, crashes or hangs is an answer, no accident."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from builders.settings.tune import TuneSettings
from builders.tune.search import FailureKind
from builders.tune.trial import TrialOrder, TrialResult, failure_of_exit
from serve.workers.gpu_memory import used_gpu_memory, wait_for_gpu_memory

_LOG_BYTES = 20_000  # the end of a log, of which the failure is told
_START_S = 1800.0  # loading, tuning and recording graphs may take this long
_KILL_S = 10.0
_MEMORY_S = 30.0  # how long the GPUs' memory is waited for when a trial's process has gone
_MEMORY_TOLERANCE_BYTES = 1 << 30


@dataclass(frozen=True)
class TrialRunner:
    """Runs trials one after the other.

    Attributes:
        directory: For orders, results and logs.
        gpus: Indices or UUIDs of the GPUs that trials use; their memory is waited for between trials.
    """

    directory: Path
    gpus: tuple[str, ...] = ()

    def run(self, number: int, order: TrialOrder, limit_s: float) -> TrialResult:
        """Run a trial. Blocks.

        Args:
            number: Of the trial; names its files.
            order: What to do.
            limit_s: A trial that takes longer is killed.
        """
        files = {name: self.directory / f"trial-{number}.{name}" for name in ("order", "result", "log")}
        files["order"].write_text(order.model_dump_json())
        before = used_gpu_memory() if self.gpus else {}
        with files["log"].open("wb") as log:
            # A session of its own: all that it starts is killed with it.
            process = subprocess.Popen(
                [sys.executable, "-m", "builders.tune.trial_process", str(files["order"]), str(files["result"])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            code = _wait(process, limit_s)
        if self.gpus:
            wait_for_gpu_memory(before, self.gpus, tolerance_bytes=_MEMORY_TOLERANCE_BYTES, limit_s=_MEMORY_S)
        if files["result"].is_file():  # written whole; whatever happened behind it, it was measured
            return TrialResult.model_validate_json(files["result"].read_bytes())
        if code is None:
            reason = f"it was not done after {limit_s:.0f} s, and was ended"
            return TrialResult(failure=FailureKind.TIMED_OUT, reason=reason)
        return failure_of_exit(code, _tail(files["log"]))


def trial_limit_s(tune: TuneSettings, points: int, start_timeout_s: float | None = None) -> float:
    """Return how long a trial may take.

    Args:
        tune: The load.
        points: Loads that it offers at most.
        start_timeout_s: Of the engine; None: it has none.
    """
    # Each load has a ramp, its time or three times that, and a grace for what does not end; the warm-up is like one.
    return (start_timeout_s or _START_S) + 60.0 + (points + 1) * (6.5 * tune.trial_s + 10.0)


def write_ring(path: Path, texts: Sequence[Sequence[int]]) -> list[int]:
    """Write the token ids of texts, one after the other, for the prompts of the load; returns them."""
    ring = [int(token) for text in texts for token in text]
    path.write_text(json.dumps(ring))
    return ring


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Wait for a process, and end all that it has started; returns its exit status, None if it took too long."""
    deadline_s = time.monotonic() + limit_s
    try:
        code: int | None = process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _kill_session(process.pid)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)
    return code


def _kill_session(leader: int) -> None:
    """Kill what is left of a session: the group of its leader, and what made groups of its own."""
    with suppress(ProcessLookupError):
        os.killpg(leader, 9)
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid != os.getpid() and os.getsid(process.pid) == leader:
                process.kill()


def _environment() -> dict[str, str]:
    """Return this process's environment, in which the child finds the same modules."""
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")
