"""Which line of TensorRT-LLM is installed, and which backends it has. Nothing here imports tensorrt_llm."""

import importlib.metadata
import importlib.util
import logging
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serve.errors import ConfigError

logger = logging.getLogger(__name__)

PACKAGE = "tensorrt_llm"


class Line(StrEnum):
    """A line of releases with one Python API."""

    V1_2 = "1.2.x"
    NEWEST = "newest"


class Backend(StrEnum):
    """What runs the model: PyTorch, or a compiled TensorRT engine (1.2.x only)."""

    PYTORCH = "pytorch"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class Installation:
    """The TensorRT-LLM that this Python would import.

    Attributes:
        version: As its metadata says, for instance `1.2.1`.
        line: Its line.
        tensorrt: Whether the TensorRT backend is there.
    """

    version: str
    line: Line
    tensorrt: bool


def line_of(version: str) -> Line:
    """Return the line that a version belongs to.

    Raises:
        ConfigError: The version is older than 1.2, or cannot be read.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ConfigError(f"tensorrt_llm has version {version!r}, which cannot be read; install 1.2.1 or newer")
    numbers = (int(match[1]), int(match[2]))
    if numbers < (1, 2):
        raise ConfigError(
            f"tensorrt_llm {version} is too old: its Python API differs from that of 1.2.x; install 1.2.1 or newer"
        )
    return Line.V1_2 if numbers == (1, 2) else Line.NEWEST


def detect() -> Installation:
    """Find the installed TensorRT-LLM without importing it: that would initialise MPI and CUDA in this process.

    Raises:
        ConfigError: It is not installed, or too old.
    """
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ValueError:  # a module without a spec was put into sys.modules
        spec = None
    if spec is None:
        raise ConfigError(
            "engine `trtllm` needs TensorRT-LLM, which is not installed in this Python: use NVIDIA's container "
            "nvcr.io/nvidia/tensorrt-llm/release, or pip install tensorrt_llm (docs/environments.md); "
            "or choose engine: transformers"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    version = _version(folders)
    line = line_of(version)
    if line is Line.NEWEST and not re.match(r"1\.[34]\b", version):
        logger.warning(
            "TensorRT-LLM %s is newer than what this release knows (1.3, 1.4); it is used like 1.4.", version
        )
    # Not find_spec of the submodule: it would import the package.
    tensorrt = any(
        (folder / "_tensorrt_engine").is_dir() or (folder / "_tensorrt_engine.py").is_file() for folder in folders
    )
    return Installation(version, line, tensorrt)


def _version(folders: list[Path]) -> str:
    """Return the version that the package itself tells, else its metadata."""
    for folder in folders:
        for name in ("version.py", "__init__.py"):
            file = folder / name
            if file.is_file() and (
                found := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", file.read_text(), re.MULTILINE)
            ):
                return found[1]
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("tensorrt_llm is installed, but does not tell its version; install it again") from None
