"""Compile: a TensorRT engine from the checkpoint; or for the PyTorch backend the settings and caches to start with."""

from typing import Any

from builders.compile import build_step, prepare_step
from builders.context import StepContext
from serve.artifacts.manifest import BundleKind

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Compile or prepare.

    Returns:
        `line`, `version` of TensorRT-LLM; `sizes` with the reason of each; `notes`; `parts_s`. Of an engine also
        `decisions` (every field of the build, with its value and reason), `command` (the like of it for trtllm-build),
        `call`, `ranks`, `size_bytes`, `timing_cache`; else `caches` (bytes of each).

    Raises:
        ConfigError: Settings contradict each other, the model, or the installed TensorRT-LLM.
        BuildFailed: TensorRT-LLM took too long, or made something else.
    """
    if context.spec.kind is BundleKind.TENSORRT_ENGINE:
        return build_step.build(context)
    return prepare_step.prepare(context)
