"""NodeFacts of this process: its GPUs as the driver tells them, and the libraries that its Python would import.

Nothing is imported that would initialise CUDA or MPI, and no GPU memory is taken: NVML is asked, and metadata is read.

`python -m serve.artifacts.node_probe` prints them as JSON, for an environment that is not this process's.
"""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from serve.artifacts.node_facts import GpuFacts, NodeFacts

logger = logging.getLogger(__name__)

# What loads or makes models: a bundle may depend on their versions.
LIBRARIES = ("tensorrt_llm", "tensorrt", "torch", "transformers", "nvidia-modelopt", "tokenizers")
# Their version is the package's own, as the metadata of a source tree or of a container may be missing.
_OWN_VERSION = frozenset({"tensorrt_llm"})


def probe_node(*, all_gpus: bool = False) -> NodeFacts:
    """Return the facts of this process and its node. Blocks for up to a second the first time.

    Args:
        all_gpus: Also those GPUs that this process may not use (`CUDA_VISIBLE_DEVICES`).
    """
    gpus, driver, cuda = _ask_driver(None if all_gpus else os.environ.get("CUDA_VISIBLE_DEVICES"))
    return NodeFacts(gpus=gpus, driver=driver, cuda=cuda, machine=platform.machine(), libraries=installed_libraries())


def installed_libraries(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of those libraries that are installed; none of them is imported."""
    found = {name: _version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def _version(name: str) -> str | None:
    if name in _OWN_VERSION and (version := _own_version(name)) is not None:
        return version
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version(package: str) -> str | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec was put into sys.modules
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in (Path(folder, "version.py"), Path(folder, "__init__.py")):
            if file.is_file() and (
                found := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", file.read_text(), re.MULTILINE)
            ):
                return found[1]
    return None


def _ask_driver(visible: str | None) -> tuple[tuple[GpuFacts, ...], str | None, str | None]:
    """Return GPUs, version of the driver, and the newest CUDA it supports.

    Args:
        visible: Indices or UUIDs of the GPUs to look at, as `CUDA_VISIBLE_DEVICES` has them; None: all.
    """
    try:
        nvml = import_module("pynvml")
    except ImportError:
        logger.warning("nvidia-ml-py is not installed in this Python, so that its GPUs are not seen; install it")
        return (), None, None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        logger.debug("NVML: %s", exc)  # no driver: a machine without GPUs
        return (), None, None
    try:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        gpus = tuple(_gpu(nvml, handle) for handle in _handles(nvml, visible))
        return gpus, _text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: Any, visible: str | None) -> list[Any]:
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for name in (part.strip() for part in visible.split(",")):
        if not name or name == "-1":
            break  # CUDA stops at the first that is none, too
        handles.append(_handle(nvml, name))
    return handles


def _handle(nvml: Any, name: str) -> Any:
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in _handles(nvml, None)]
    full = [uuid for uuid in uuids if uuid.startswith(name)]  # CUDA accepts the beginning of a UUID
    return nvml.nvmlDeviceGetHandleByUUID(full[0] if len(full) == 1 else name)


def _gpu(nvml: Any, handle: Any) -> GpuFacts:
    name, memory = _text(nvml.nvmlDeviceGetName(handle)), int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:  # of a part of a GPU (MIG) only the whole one knows it
        parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(parent)
    return GpuFacts(name=name, compute_capability=f"{major}.{minor}", memory_bytes=memory)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    sys.stdout.write(probe_node(all_gpus=True).model_dump_json() + "\n")
