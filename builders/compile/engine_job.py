"""A job for an engine's own process: build an engine and save it, or start one and warm its caches.

TensorRT-LLM changes its process for good (environment, MPI, threads, GPU memory), and may hang: so it has a process of
its own, with a deadline, which tells over a pipe how far it is.
"""

import contextlib
import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from builders.errors import BuildFailed
from serve.engines.trtllm.call import ConstructorCall
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

_STEP = "compile"
_MODULE = "builders.compile.engine_process"
_TAIL_LINES = 12
_NO_GPU = re.compile(r"No CUDA GPUs are available|Only \d+ GPUs? (is|are) available", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_KILL_LIMIT_S = 10.0
Told = Callable[[str], None]


@dataclass(frozen=True)
class EngineJob:
    """What the process does.

    Attributes:
        action: build: save the engine to `output`; warm: generate a token.
        call: Of the LLM class.
        line: Of TensorRT-LLM.
        environ: Variables to set before it is imported; None removes one.
        output: Directory for the engine.
        stop_timeout_s: How long shutting down may take.
    """

    action: Literal["build", "warm"]
    call: ConstructorCall
    line: str
    environ: Mapping[str, str | None]
    output: str
    stop_timeout_s: float


@dataclass(frozen=True)
class JobReport:
    """What it told at its end.

    Attributes:
        version: Of TensorRT-LLM.
        parts_s: How long each part took, in seconds.
    """

    version: str
    parts_s: dict[str, float]


def run_job(job: EngineJob, log: Path, limit_s: float, told: Told) -> JobReport:
    """Run a job. Blocks.

    Args:
        job: What to do.
        log: File for what the libraries print.
        limit_s: How long it may take; then it is killed, with its ranks.
        told: Called with each stage.

    Raises:
        ConfigError: TensorRT-LLM refuses the arguments.
        BuildFailed: It took too long.
        RuntimeError: The process failed otherwise, or died: maybe an accident.
    """
    reader, writer = os.pipe()
    with log.open("wb") as output, open(reader, "rb") as reports:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(writer)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
        os.close(writer)
        assert process.stdin is not None
        try:
            process.stdin.write(to_json(job).encode())
            process.stdin.close()
            return _follow(process, reports, limit_s, told, log)
        except BrokenPipeError:
            raise RuntimeError(f"the engine's process ended before it began: {_tail(log)}") from None
        finally:
            _end(process)


def _follow(process: "subprocess.Popen[bytes]", reports: Any, limit_s: float, told: Told, log: Path) -> JobReport:
    deadline_s = time.monotonic() + limit_s
    stage = "starting Python"
    for report in _reports(reports, deadline_s):
        if report is None:
            raise BuildFailed(
                _STEP,
                f"TensorRT-LLM was not done after {limit_s:.0f} s (last seen: {stage}); raise target.time_limit_s, or "
                f"build faster (engine.build.fast, compile.multiple_profiles: false). Its last lines: {_tail(log)}",
            )
        match report:
            case {"stage": str(stage)}:
                told(stage)
            case {"done": {"version": version, "parts_s": parts_s}}:
                return JobReport(version, parts_s)
            case {"mistake": str(message)}:
                raise ConfigError(message)
            case {"failed": str(message)}:
                print(log.read_text(errors="replace"))  # into the step's own log
                raise _failure(message, stage)
    status = process.wait(_KILL_LIMIT_S)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise RuntimeError(f"the engine's process {how} (while {stage}). Last lines of the log: {_tail(log)}")


def _failure(message: str, stage: str) -> Exception:
    """Tell what trying again will not help from what may be an accident."""
    if _NO_GPU.search(message):
        return ConfigError(
            f"target.accelerator: TensorRT-LLM found too few GPUs ({message}); name the GPU model, so that the step "
            "reserves as many as parallel has ranks, or lower parallel"
        )
    if _NO_MEMORY.search(message):
        return BuildFailed(
            _STEP,
            f"the GPU's memory does not suffice while {stage} ({message}); lower compile's sizes, or use more GPUs",
        )
    return RuntimeError(f"{message} (while {stage})")


def _reports(reports: Any, deadline_s: float) -> Any:
    """Yield what the process tells, one JSON line each; None at the deadline; end with the process."""
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reports, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                yield None
                return
            content = os.read(reports.fileno(), 65536)
            *lines, waiting = (waiting + content).split(b"\n")
            yield from map(json.loads, lines)
            if not content:
                return


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its ranks, which 1.2.x leaves behind if it is killed."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    if process.poll() is None:
        process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: whoever is left of it
    try:
        process.wait(_KILL_LIMIT_S)
    except subprocess.TimeoutExpired:  # in the kernel, for instance in the driver
        logger.error("Process %d of TensorRT-LLM cannot be killed.", process.pid)


def _python_path() -> str:
    """Return where the process finds this package: Ray may have put it on this one's path only."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), own])


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-_TAIL_LINES:] if line.strip()) or "nothing"


def to_json(job: EngineJob) -> str:
    """Write a job."""
    return json.dumps({**asdict(job), "call": _call_to_plain(job.call)})


def from_json(text: str) -> EngineJob:
    """Read a job."""
    content = json.loads(text)
    return EngineJob(**{**content, "call": _plain_to_call(content["call"])})


def _call_to_plain(value: Any) -> Any:
    if isinstance(value, ConstructorCall):
        return {"!call": value.target, "keywords": _call_to_plain(dict(value.keywords))}
    if isinstance(value, Mapping):
        return {key: _call_to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_call_to_plain(part) for part in value]
    return value


def _plain_to_call(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "!call" in value:
            return ConstructorCall(value["!call"], _plain_to_call(value["keywords"]))
        return {key: _plain_to_call(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain_to_call(part) for part in value]
    return value
