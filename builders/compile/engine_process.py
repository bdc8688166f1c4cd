"""The process of one `EngineJob`: `python -m builders.compile.engine_process FD`, the job on standard input.

Reports are JSON lines, written to the file descriptor FD; standard output is the libraries' own.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builders.compile.engine_job import EngineJob, from_json
from serve.engines.trtllm.call import make
from serve.engines.trtllm.construct import apply_environ
from serve.engines.trtllm.line import Line, detect
from serve.engines.trtllm.signature_data import check_names
from serve.engines.trtllm.startup import LIBRARY_LOGGER, stage_of
from serve.errors import ConfigError

Tell = Callable[[dict[str, Any]], None]


class _Stages(logging.Handler):
    """Follows the library's log, and tells each new stage."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        stage = stage_of(record.getMessage())
        if stage is not None and stage != self._last:
            self._last = stage
            self._tell({"stage": stage})


def main(descriptor: int) -> int:
    """Do the job; the exit status is 0 if it was done."""
    os.set_inheritable(descriptor, False)  # a rank that is left behind must not hold it open
    job = from_json(sys.stdin.read())

    def tell(report: dict[str, Any]) -> None:
        os.write(descriptor, f"{json.dumps(report)}\n".encode())

    try:
        tell({"done": _do(job, tell)})
    except ConfigError as exc:
        tell({"mistake": str(exc)})
    except (ValueError, TypeError) as exc:  # what its constructors and pydantic models raise
        traceback.print_exc()
        tell({"mistake": f"engine: TensorRT-LLM refuses the configuration: {exc}"})
    except Exception as exc:
        traceback.print_exc()
        tell({"failed": f"{type(exc).__name__}: {exc}"})
    else:
        return 0
    return 1


def _do(job: EngineJob, tell: Tell) -> dict[str, Any]:
    parts_s: dict[str, float] = {}
    begin_s = time.monotonic()

    def lap(name: str) -> None:
        nonlocal begin_s
        now_s = time.monotonic()
        parts_s[name] = round(now_s - begin_s, 3)
        begin_s = now_s

    apply_environ(job.environ)
    version = detect().version
    logging.getLogger(LIBRARY_LOGGER).addHandler(_Stages(tell))
    tell({"stage": "importing TensorRT-LLM"})
    check_names(job.call, Line(job.line), installed=True)
    lap("import")
    tell({"stage": "building the engine" if job.action == "build" else "starting the engine"})
    llm = make(job.call)
    lap("build" if job.action == "build" else "start")
    try:
        if job.action == "build":
            tell({"stage": "saving the engine"})
            llm.save(str(Path(job.output)))  # before shutdown, which removes the library's working directory
            lap("save")
        else:
            tell({"stage": "generating a token"})
            _generate(llm)
            lap("generate")
    finally:
        _shut_down(llm, job.stop_timeout_s)
    lap("stop")
    return {"version": version, "parts_s": parts_s}


def _generate(llm: Any) -> None:
    from tensorrt_llm import SamplingParams  # type: ignore[import-not-found]  # a GPU library: late

    llm.generate([0], SamplingParams(end_id=-1, max_tokens=2))


def _shut_down(llm: Any, limit_s: float) -> None:
    """Shut down, which may hang: what is wanted is on the disk by then."""
    thread = threading.Thread(target=llm.shutdown, name="shutdown", daemon=True)
    thread.start()
    thread.join(limit_s)


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads and MPI of the library may keep the interpreter from ending
