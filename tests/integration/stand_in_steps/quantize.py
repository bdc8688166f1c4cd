"""Quantize: the checkpoint as it is, with the file that says otherwise."""

import json
import shutil
from typing import Any

from builders.context import StepContext, StepName
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Copy it."""
    begin("quantize", context)
    for name in context.inputs[StepName.FETCH].result["files"]:
        shutil.copyfile(context.checkpoint / name, context.output / name)
    quantization = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (context.output / "hf_quant_config.json").write_text(json.dumps(quantization))
    return {"algorithm": "FP8"}
