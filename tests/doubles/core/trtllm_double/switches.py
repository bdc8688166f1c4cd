"""The switches of the double: variables of the environment, read when they matter. README.md describes each."""

import os
import time
from pathlib import Path


class DoubleMisuse(AssertionError):
    """The double was used in a way that upstream does not refuse, but that goes wrong there."""


class NotModelled(NotImplementedError):
    """TensorRT-LLM can do this; the double does not imitate it, and says so instead of pretending."""


misuses: list[str] = []


def misuse(what: str) -> None:
    """Record what would go wrong with the real library, and fail loudly unless TRTLLM_DOUBLE_LENIENT=1."""
    misuses.append(what)
    if os.environ.get("TRTLLM_DOUBLE_LENIENT") != "1":
        raise DoubleMisuse(what)


def device_count() -> int:
    """Return what torch.cuda.device_count() would say: TRTLLM_DOUBLE_GPUS (8), masked by CUDA_VISIBLE_DEVICES."""
    there = int(os.environ.get("TRTLLM_DOUBLE_GPUS", "8"))
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return there
    visible = 0
    for entry in mask.split(","):
        if not entry.strip().isdigit() or int(entry) >= there:
            break  # CUDA ignores everything from the first invalid entry on
        visible += 1
    return visible


def number(name: str, default: float) -> float:
    """Return a switch that is a number."""
    return float(os.environ.get(f"TRTLLM_DOUBLE_{name}", default))


def flag(name: str) -> bool:
    """Return whether a switch is 1."""
    return os.environ.get(f"TRTLLM_DOUBLE_{name}") == "1"


def text(name: str) -> str:
    """Return a switch that is a string; empty if unset."""
    return os.environ.get(f"TRTLLM_DOUBLE_{name}", "")


def take_fault(name: str) -> str | None:
    """Return the content of the fault file `name`, and remove it; None: nobody asked for this fault.

    A fault is a file in the directory TRTLLM_DOUBLE_FAULTS, so that any process can ask any other for it, at any time.
    """
    folder = text("FAULTS")
    if not folder:
        return None
    path = Path(folder) / name
    try:
        content = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return None
    return content.strip()


def fault_is_set(name: str) -> bool:
    """Return whether a lasting fault is asked for: it holds for as long as its file is there."""
    folder = text("FAULTS")
    return bool(folder) and (Path(folder) / name).exists()


def fault_text(name: str) -> str | None:
    """Return the content of a lasting fault; None: nobody asks for it."""
    try:
        return Path(text("FAULTS"), name).read_text().strip() if text("FAULTS") else None
    except FileNotFoundError:
        return None


def hang() -> None:
    """Never return, as a collective operation whose partner is gone."""
    while True:
        time.sleep(3600)
