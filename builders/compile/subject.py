"""From a step's context to what is compiled: model, sizes, and the TensorRT-LLM that does it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.compile.sizes import EngineSizes, Place, plan_sizes
from builders.context import StepContext, StepName
from builders.resources import engine_settings
from builders.source.selection import CONFIG
from serve.engines.simulated.checkpoint import read_checkpoint
from serve.engines.simulated.split import Precisions, Split
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

_BY_ALGORITHM: dict[str | None, Any] = {
    "FP8": "fp8", "NVFP4": "fp4", "W4A16_AWQ": "int4", "W8A8_SQ_PER_CHANNEL": "int8", "W8A16": "int8", None: "bf16",
}  # fmt: skip
_KV_BY_ALGORITHM: dict[str | None, Any] = {"FP8": "fp8", "NVFP4": "fp4", None: "bf16"}


@dataclass(frozen=True)
class Compiled:
    """What is compiled.

    Attributes:
        settings: Of the engine.
        sizes: That bound it.
        config: The source's config.json.
        algorithm, kv_algorithm: Of the checkpoint's weights, keys and values; None: 16 bits.
        experts: Whether it is a mixture of experts.
    """

    settings: TrtllmSettings
    sizes: EngineSizes
    config: dict[str, Any]
    algorithm: str | None
    kv_algorithm: str | None
    experts: bool

    @property
    def dtype(self) -> str:
        """Of what is not quantized."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        chosen = self.settings.dtype if self.settings.dtype != "auto" else named
        return chosen if chosen in ("float16", "bfloat16") else "bfloat16"


def read_subject(context: StepContext) -> Compiled:
    """Find out what is compiled, and how large.

    Raises:
        ConfigError: The model does not fit the GPUs, or sizes exclude each other.
    """
    settings = engine_settings(context.spec, StepName.COMPILE)
    if not isinstance(settings, TrtllmSettings):
        raise ConfigError(f"kind: a {context.spec.kind.value} is not compiled; report this")
    source = read_checkpoint(context.checkpoint, "use a model that is known")
    algorithm, kv_algorithm = _algorithms(context)
    precisions = source.precisions
    if algorithm is not None:
        precisions = Precisions(weights=_BY_ALGORITHM[algorithm], kv_cache=_KV_BY_ALGORITHM[kv_algorithm])
    gpu = context.node.gpus[0] if context.node.gpus and context.spec.target.accelerator is not None else None
    split = Split(**context.spec.parallel.model_dump(), attention_dp=settings.attention_dp.enabled)
    place = Place(source.shape, precisions, split, gpu.memory_bytes if gpu is not None else None)
    sizes = plan_sizes(place, context.spec.compile, settings, context.spec.tune)
    config = json.loads((context.checkpoint / CONFIG).read_bytes())
    return Compiled(settings, sizes, config, algorithm, kv_algorithm, source.shape.experts > 0)


def _algorithms(context: StepContext) -> tuple[str | None, str | None]:
    """Return how weights, and keys and values, are quantized: by this build, or before."""
    if StepName.QUANTIZE in context.inputs:
        result = context.inputs[StepName.QUANTIZE].result
        return result["algorithm"], result["kv_cache_algorithm"]
    path: Path = context.checkpoint / "hf_quant_config.json"
    if not path.is_file():
        return None, None
    details = json.loads(path.read_bytes())["quantization"]
    algorithm = details.get("quant_algo")
    return (algorithm if algorithm in _BY_ALGORITHM else None), details.get("kv_cache_quant_algo")
