"""Put a double of TensorRT-LLM where `import tensorrt_llm` finds it: in this process for a while, or in another one."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

LineName = Literal["1.2.x", "newest"]
_FOLDERS = {"1.2.x": "trtllm_1_2", "newest": "trtllm_newest"}
_PACKAGES = ("tensorrt_llm", "trtllm_double")


def double_path(line: LineName) -> Path:
    """Return the directory to put first on PYTHONPATH or sys.path."""
    return Path(__file__).resolve().parent / _FOLDERS[line]


def double_environ(line: LineName, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which any Python, also one without this repository installed, imports the double."""
    environ = dict(os.environ if inherited is None else inherited)
    before = environ.get("PYTHONPATH")
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(double_path(line)), before]))
    return environ


@contextmanager
def installed(line: LineName, **environ: str) -> Iterator[None]:
    """Let this process import the double of a line, with these variables set; both end with the context.

    PYTHONPATH is set too, so that ranks in other processes find it. Modules of another line are forgotten.
    """
    path_before, environ_before = list(sys.path), dict(os.environ)
    _forget()
    sys.path.insert(0, str(double_path(line)))
    os.environ.update(double_environ(line))
    os.environ.update(environ)
    try:
        yield
    finally:
        _forget()
        sys.path[:] = path_before
        os.environ.clear()
        os.environ.update(environ_before)


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
        del sys.modules[name]
