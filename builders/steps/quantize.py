"""Quantize: a checkpoint with weights of fewer bits, checked against its source."""

import json
import time
from typing import Any

from builders.context import StepContext, StepName
from builders.errors import BuildFailed
from builders.quantize.recipes import export_format, min_compute_capability, recipe_facts, recipe_mistakes
from builders.source.selection import CONFIG
from serve.errors import ConfigError

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Quantize the source as the recipe says.

    Returns:
        `recipe`, `algorithm`, `kv_cache_algorithm`, `format` (unified or tensorrt-llm), `producer`,
        `min_compute_capability`, `excluded`, `device`, `notes`; `calibration` (samples, tokens, seed, texts; None: not
        needed); `relative_error` (mean, worst, and of each layer: norm of the weight's change over its norm);
        `size_bytes`, `source_bytes`, `seconds`. Of what ModelOpt made also `kv_scales`, `peak_memory_bytes`, `parts_s`.

    Raises:
        ConfigError: The settings fit neither the source, nor its texts.
        BuildFailed: The recipe cannot be applied to this model, or what comes out is broken.
    """
    # PyTorch, and what needs it, late: the driver of a build imports this module for CODE_VERSION.
    from builders.quantize import int8_checkpoint, modelopt_checkpoint

    settings, kind = context.spec.quantize, context.spec.kind
    facts = recipe_facts(settings)
    if facts is None:
        raise BuildFailed("quantize", "quantize.recipe is none: there is nothing to do; report this")
    if mistakes := recipe_mistakes(settings, kind):
        raise ConfigError("\n".join(mistakes))
    _check_source(context)
    begin_s = time.monotonic()
    make = int8_checkpoint.make if facts.config is None else modelopt_checkpoint.make
    made = make(context)
    return {
        "recipe": settings.recipe,
        "format": export_format(settings, kind),
        "min_compute_capability": min_compute_capability(settings),
        "size_bytes": sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file()),
        "source_bytes": context.inputs[StepName.FETCH].result.get("size_bytes"),
        "seconds": round(time.monotonic() - begin_s, 3),
        **made,
    }


def _check_source(context: StepContext) -> None:
    config = json.loads((context.checkpoint / CONFIG).read_bytes())
    given = config.get("quantization_config")
    if given is not None or (context.checkpoint / "hf_quant_config.json").is_file():
        what = (given or {}).get("quant_method", "ModelOpt")
        raise ConfigError(
            f"quantize.recipe: {context.spec.source.location} is quantized already ({what}); use recipe: none to serve "
            "it as it is, or give the checkpoint that it was made from"
        )
