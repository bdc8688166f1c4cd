"""Where a model is quantized: on one GPU, over several, or on the CPU. PURE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from builders.errors import BuildFailed

# Weights, what calibration keeps of them (AWQ scales a copy of a layer), and activations of a small batch.
_ROOM = 1.2
_SPARE_BYTES = 2 << 30


@dataclass(frozen=True)
class Placement:
    """Where.

    Attributes:
        device: `cpu` or `cuda`.
        spread: Whether layers lie on several GPUs.
        note: What an operator should know; None: nothing.
    """

    device: Literal["cpu", "cuda"]
    spread: bool = False
    note: str | None = None


def choose_placement(
    asked: Literal["auto", "cpu", "cuda"], weight_bytes: int, gpu_free_bytes: Sequence[int], memory_bytes: int
) -> Placement:
    """Decide where a model is quantized.

    Args:
        asked: The setting.
        weight_bytes: Of the model in 16 bits.
        gpu_free_bytes: Free memory of each GPU that this process sees.
        memory_bytes: Free main memory.

    Raises:
        BuildFailed: It fits nowhere, or there is no GPU although one is asked for.
    """
    needed = int(weight_bytes * _ROOM) + (_SPARE_BYTES if gpu_free_bytes else 0)
    if asked == "cuda" and not gpu_free_bytes:
        raise BuildFailed(
            "quantize",
            "quantize.device: 'cuda' was asked for, but this process sees no CUDA GPU; set target.accelerator, so that "
            "the step runs where one is, or use device: auto",
        )
    if asked != "cpu" and gpu_free_bytes:
        if gpu_free_bytes[0] >= needed:
            return Placement("cuda")
        if sum(gpu_free_bytes) >= needed:
            return Placement("cuda", spread=True)
    where = f"{_gib(needed)} are needed to quantize the model, and {_gib(sum(gpu_free_bytes))} of GPU memory are free"
    if asked == "cuda":
        raise BuildFailed("quantize", f"{where}; use more GPUs (parallel), or device: cpu, which is slow")
    if weight_bytes * _ROOM > memory_bytes:
        raise BuildFailed("quantize", f"{where}, and {_gib(memory_bytes)} of main memory; use a larger node")
    return Placement("cpu", note=f"On the CPU: {where}." if asked == "auto" and gpu_free_bytes else None)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
