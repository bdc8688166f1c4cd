"""The quantize step for int8_weight_only. Needs PyTorch and transformers, not ModelOpt."""

from typing import Any

import torch

from builders.context import StepContext, StepName
from builders.quantize.config_files import (
    copy_side_files,
    inline_quantization,
    weight_only_quantization,
    write_config,
    write_quantization,
)
from builders.quantize.export_check import ExportReport, check_export
from builders.quantize.layers import check_exclude, linear_layers, quantized_layers
from builders.quantize.quiet import quiet
from builders.quantize.tensor_files import TensorReader
from builders.quantize.weight_only import write_weight_only

_PHASES = 2


def make(context: StepContext) -> dict[str, Any]:
    """Write the checkpoint, and check it.

    Returns:
        The step's result, as far as it is this recipe's.

    Raises:
        ConfigError, BuildFailed: As the step says.
    """
    settings, source, target = context.spec.quantize, context.checkpoint, context.output
    with quiet():
        linears = linear_layers(source)
    with TensorReader(source) as reader:
        check_exclude(reader.names, settings.exclude)
        layers = quantized_layers(reader.names, linears, settings.exclude)
        write_weight_only(reader, layers, target, _phase(context, 0))
        kept = _kept(reader, layers)
        quantization = weight_only_quantization(kept)
        write_quantization(target, quantization)
        write_config(source, target, inline_quantization(quantization))
        copy_side_files(source, context.inputs[StepName.FETCH].result["files"], target)
        with TensorReader(target) as export:
            report = check_export(reader, export, torch.device("cpu"), _phase(context, 1))
    return {
        "algorithm": quantization["quantization"]["quant_algo"],
        "kv_cache_algorithm": None,
        "producer": quantization["producer"],
        "excluded": kept,
        "device": "cpu",
        "calibration": None,
        "relative_error": describe_errors(report),
        "notes": [],
    }


def describe_errors(report: ExportReport) -> dict[str, Any]:
    """Return a report as JSON."""
    layer, error = report.worst
    return {
        "mean": round(report.mean, 6),
        "worst": round(error, 6),
        "worst_layer": layer,
        "layers": {name: round(value, 6) for name, value in report.errors.items()},
    }


def _phase(context: StepContext, number: int) -> Any:
    def tell(done: int, total: int, name: str) -> None:
        context.progress(number * total + done, _PHASES * total, ("writing ", "checking ")[number] + name)

    return tell


def _kept(reader: TensorReader, layers: tuple[str, ...]) -> list[str]:
    """Return the modules whose weights are matrices, and stay as they are."""
    chosen = set(layers)
    modules = (name.removesuffix(".weight") for name in reader.names if name.endswith(".weight"))
    return sorted({"lm_head", *(m for m in modules if m not in chosen and len(reader.shape(f"{m}.weight")) == 2)})
