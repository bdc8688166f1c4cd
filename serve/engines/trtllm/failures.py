"""PURE: what an exception of TensorRT-LLM means: one request's failure, or the end of the engine."""

import re
from dataclasses import dataclass

_FATAL = re.compile(
    r"illegal (memory access|address|instruction)|ILLEGAL_(ADDRESS|INSTRUCTION)|misaligned address|MISALIGNED_ADDRESS"
    r"|uncorrectable ecc|ECC_UNCORRECTABLE|\becc error|nvlink (error|uncorrectable)|NVLINK_UNCORRECTABLE"
    r"|device-side assert|CUDA_ERROR_ASSERT|cudaErrorAssert|launch (timed out|timeout)|LAUNCH_(TIMEOUT|FAILED)"
    r"|unspecified launch failure|hardware stack error|invalid (program counter|address space)"
    r"|device (is )?lost|fallen off the bus|no cuda-capable device|context is destroyed|CONTEXT_IS_DESTROYED"
    r"|nccl (error|failure|timeout)|ncclUnhandledCudaError|ncclSystemError|ncclRemoteError",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|cudaErrorMemoryAllocation", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """What an exception means.

    Attributes:
        is_fatal: The engine cannot go on.
        message: For whoever has to act.
        code: Of a request's failure, machine-readable.
    """

    is_fatal: bool
    message: str
    code: str | None = None


def classify(error: BaseException, *, is_request_error: bool) -> Failure:
    """Decide.

    Args:
        error: What TensorRT-LLM raised.
        is_request_error: Whether it is the library's `RequestError`, which by its own rule is about one request.

    Source: the rules of NVIDIA Dynamo's TensorRT-LLM component (PRs 3544, 10266 and 8342).
    """
    text = str(error) or type(error).__name__
    if not is_request_error:
        return Failure(True, f"{type(error).__name__}: {text}")
    if _OUT_OF_MEMORY.search(text):
        return Failure(False, f"the engine ran out of GPU memory for this request: {text}", "out_of_memory")
    if _FATAL.search(text):
        return Failure(True, f"the GPU failed: {text}")
    return Failure(False, f"the engine refused the request: {text}", "engine_refused")
