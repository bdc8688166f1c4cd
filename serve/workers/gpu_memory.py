"""GPU memory of one machine: how much of each GPU is in use, and the wait until it is given back.

The driver frees a process's memory when the process has gone, a moment after its death. An engine that starts before
that takes a share of what is free then, and ends up with a tiny KV cache instead of an error.
"""

import contextlib
import csv
import io
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

GpuMemory = Mapping[str, int]  # index, as the driver counts GPUs, and UUID -> bytes in use
_POLL_S = 0.1


def used_gpu_memory() -> GpuMemory:
    """Return the bytes in use of each GPU of this machine, under its index and its UUID; empty if there is none.

    Asks the driver's library if its Python binding is installed, else `nvidia-smi`. Blocks for up to a second.
    """
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return _ask_nvidia_smi()
    try:
        return _ask_nvml(nvml)
    except nvml.NVMLError as exc:
        logger.debug("NVML: %s", exc)  # no driver: a machine without GPUs that has the library all the same
        return {}


@cache
def warn_unwatched() -> None:
    """Say once that this process owns GPUs whose memory nobody can tell."""
    logger.warning(
        "GPU memory is not waited for after a failure: neither pynvml nor nvidia-smi tells how much is in use. Install "
        "nvidia-ml-py in the replica's environment."
    )


def wait_for_gpu_memory(
    before: GpuMemory,
    gpus: tuple[str, ...],
    *,
    tolerance_bytes: int,
    limit_s: float,
    used: Callable[[], GpuMemory] = used_gpu_memory,
) -> tuple[str, ...]:
    """Wait until no more of the GPUs is in use than before. Blocks.

    Args:
        before: What was in use before the engine started.
        gpus: Indices or UUIDs; those that are not in `before` are passed over.
        tolerance_bytes: So much more is accepted.
        limit_s: When to stop waiting.
        used: What is in use now.

    Returns:
        Those that were not given back in time, each with its numbers; empty if all is well.
    """
    deadline_s = time.monotonic() + limit_s
    known = [gpu for gpu in dict.fromkeys(gpus) if gpu in before]
    while known:
        now = used()
        held = {gpu: now.get(gpu, 0) for gpu in known if now.get(gpu, 0) > before[gpu] + tolerance_bytes}
        if not held:
            break
        if time.monotonic() > deadline_s:
            return tuple(
                f"GPU {gpu}: {size / 2**30:.1f} GiB in use, {before[gpu] / 2**30:.1f} before the start"
                for gpu, size in held.items()
            )
        time.sleep(_POLL_S)
    return ()


def _ask_nvml(nvml: Any) -> GpuMemory:
    found: dict[str, int] = {}
    nvml.nvmlInit()
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            found[str(index)] = found[uuid if isinstance(uuid, str) else uuid.decode()] = used
    finally:
        nvml.nvmlShutdown()
    return found


def _ask_nvidia_smi() -> GpuMemory:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        logger.warning("nvidia-smi does not answer, so GPU memory is not watched: %s", exc)
        return {}
    return parse_nvidia_smi(answer.stdout)


def parse_nvidia_smi(text: str) -> GpuMemory:
    """Read `index, uuid, MiB in use`, a line a GPU; what has no number (`[N/A]`) is left out."""
    found: dict[str, int] = {}
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        with contextlib.suppress(ValueError):
            index, uuid, used_mib = row
            found[index] = found[uuid] = int(used_mib) * 2**20
    return found
