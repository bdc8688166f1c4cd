"""The quantize step for the recipes that ModelOpt carries out. Needs PyTorch, transformers and ModelOpt."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from builders.context import StepContext, StepName
from builders.errors import BuildFailed
from builders.quantize.calibration import CalibrationPass, check_samples, make_batches, tokens_of_a_batch
from builders.quantize.config_files import QUANTIZATION, copy_side_files, write_config
from builders.quantize.export_check import ExportReport, check_export
from builders.quantize.int8_checkpoint import describe_errors
from builders.quantize.layers import check_exclude, is_kept, linear_layers, quantized_layers
from builders.quantize.placement import Placement, choose_placement
from builders.quantize.quiet import quiet
from builders.quantize.recipes import export_format, recipe_facts
from builders.quantize.tensor_files import TensorReader, weight_bytes
from builders.quantize.tensorrt_checkpoint import add_rotary, check_ranks, decoder_of
from builders.settings.quantize import QuantizeSettings
from builders.source.selection import CONFIG
from builders.texts.encoder import PromptEncoder
from builders.texts.reader import read_texts
from serve.errors import ConfigError

_NVFP4_GROUP = 16
# AWQ looks at the activations first, and then tries scales.
_PASSES = {"int4_awq": 2}
_SIMULATED = (
    "Calibrated on the CPU, where PyTorch simulates the arithmetic of the quantized layers: the exported scales and "
    "weights are the same as a GPU's up to rounding, but nothing is known about speed."
)


@dataclass
class _Clock:
    """How long each part took, in seconds."""

    seconds: dict[str, float]
    begin_s: float

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self.seconds[name] = round(now_s - self.begin_s, 3)
        self.begin_s = now_s


def make(context: StepContext, look: Callable[[Any], None] = lambda model: None) -> dict[str, Any]:
    """Quantize, export and check.

    Args:
        context: Of the step.
        look: Called with the quantized model before the export takes it apart, for measurements.

    Returns:
        The step's result, as far as it is these recipes'.

    Raises:
        ConfigError, BuildFailed: As the step says.
    """
    settings, source = context.spec.quantize, context.checkpoint
    trusts = bool(getattr(context.spec.engine_settings(), "trust_remote_code", False))
    config = json.loads((source / CONFIG).read_bytes())
    clock = _Clock({}, time.monotonic())
    samples = _samples(context)
    placement = _placement(context)
    with quiet():
        _check_layers(source, settings, trusts)
        from builders.quantize import modelopt  # takes seconds, and is not installed everywhere

        clock.lap("import")
        torch.manual_seed(settings.calibration.seed)
        dtype = _dtype(config)
        if placement.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = modelopt.load_source(source, placement, dtype, trust_remote_code=trusts)
        clock.lap("load")
        calibrate = _calibration(context, model, samples, placement)
        notes = modelopt.quantize(model, settings, calibrate)
        clock.lap("quantize")
        look(model)
        clock.lap("look")
        made = _export(context, modelopt, model, clock)
        peak = _peak_bytes(placement)
        del model
    notes += [placement.note] if placement.note else []
    notes += [_SIMULATED] if placement.device == "cpu" else []
    return {
        **made,
        "device": torch.cuda.get_device_name() if placement.device == "cuda" else "cpu",
        "peak_memory_bytes": peak,
        "calibration": {
            "samples": len(samples),
            "tokens": calibrate.tokens,
            "seed": settings.calibration.seed,
            "texts": settings.calibration.file or "package",
        },
        "parts_s": clock.seconds,
        "notes": notes,
    }


def _samples(context: StepContext) -> list[tuple[int, ...]]:
    encoder = PromptEncoder(context.checkpoint)
    texts = read_texts(context.spec.quantize.calibration, context.user_files, encoder, "calibration")
    return [sample.tokens for sample in texts]


def _placement(context: StepContext) -> Placement:
    parameters = int(context.inputs[StepName.FETCH].result.get("parameters") or 0)
    size = 2 * parameters or weight_bytes(context.checkpoint)
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return choose_placement(context.spec.quantize.device, size, free, psutil.virtual_memory().available)


def _check_layers(source: Path, settings: QuantizeSettings, trusts: bool) -> None:
    """Find out what ModelOpt would find out after the calibration."""
    group = {"int4_awq": settings.group_size, "nvfp4": _NVFP4_GROUP}.get(settings.recipe)
    linears = linear_layers(source, trust_remote_code=trusts)
    with TensorReader(source) as reader:
        check_exclude(reader.names, settings.exclude)
        for layer in quantized_layers(reader.names, linears, settings.exclude):
            inputs = reader.shape(f"{layer}.weight")[1]
            if group is not None and inputs % group:
                raise ConfigError(
                    f"quantize.recipe: {settings.recipe} has groups of {group} inputs, and {layer} has {inputs}; "
                    "exclude it (quantize.exclude), or use another recipe" + _smaller_group(settings)
                )


def _smaller_group(settings: QuantizeSettings) -> str:
    return ", or group_size: 64" if settings.recipe == "int4_awq" and settings.group_size > 64 else ""


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the type of what is not quantized: the source's, if it has 16 bits."""
    name = config.get("dtype") or config.get("torch_dtype")
    return torch.float16 if name == "float16" else torch.bfloat16


def _calibration(
    context: StepContext, model: Any, samples: list[tuple[int, ...]], placement: Placement
) -> CalibrationPass:
    config = model.config.get_text_config()
    check_samples(samples, config.vocab_size)
    free = torch.cuda.mem_get_info()[0] if placement.device == "cuda" else psutil.virtual_memory().available
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    batches = make_batches(samples, tokens_of_a_batch(free, config.hidden_size, widest, config.vocab_size))
    return CalibrationPass(batches, _PASSES.get(context.spec.quantize.recipe, 1), _part(context, 0))


def _export(context: StepContext, modelopt: Any, model: Any, clock: _Clock) -> dict[str, Any]:
    settings = context.spec.quantize
    if export_format(settings, context.spec.kind) == "tensorrt-llm":
        return _export_tensorrt(context, modelopt, model, clock)
    exported = context.scratch / "export"
    modelopt.export_unified(model, settings, exported)
    clock.lap("export")
    for path in sorted(exported.glob("*.safetensors*")):
        shutil.move(path, context.output / path.name)
    shutil.move(exported / QUANTIZATION, context.output / QUANTIZATION)
    inline = json.loads((exported / CONFIG).read_bytes())["quantization_config"]
    own = json.loads((context.checkpoint / CONFIG).read_bytes())
    is_16_bit = (own.get("dtype") or own.get("torch_dtype")) in ("float16", "bfloat16")
    dtype = None if is_16_bit else str(model.dtype).removeprefix("torch.")
    write_config(context.checkpoint, context.output, inline, dtype)
    copy_side_files(context.checkpoint, context.inputs[StepName.FETCH].result["files"], context.output)
    device = model.device
    with TensorReader(context.checkpoint) as source, TensorReader(context.output) as export:
        report = check_export(source, export, device, _part(context, 1))
    clock.lap("check")
    wrong = [layer for layer in report.errors if is_kept(layer, settings.exclude)]
    if wrong:
        raise BuildFailed("quantize", f"{wrong[0]} is to be excluded, but ModelOpt quantized it; name its module alone")
    content = json.loads((context.output / QUANTIZATION).read_bytes())
    details = content["quantization"]
    facts = recipe_facts(settings)
    if facts is not None and details["quant_algo"] != facts.algorithm:
        raise BuildFailed("quantize", f"ModelOpt made {details['quant_algo']}, not {facts.algorithm}; report this")
    return _described(content, report)


def _export_tensorrt(context: StepContext, modelopt: Any, model: Any, clock: _Clock) -> dict[str, Any]:
    settings, layout = context.spec.quantize, context.spec.parallel
    own = json.loads((context.checkpoint / CONFIG).read_bytes())
    decoder = decoder_of(own["architectures"][0], settings.recipe)
    device = model.device
    modelopt.export_tensorrt_llm(model, settings, decoder, context.output, layout.tensor, layout.pipeline)
    add_rotary(context.output, own)
    clock.lap("export")
    with TensorReader(context.checkpoint) as source:
        report = check_ranks(context.output, source, own, layout, device, _part(context, 1))
    clock.lap("check")
    return _described(json.loads((context.output / CONFIG).read_bytes()), report)


def _described(content: dict[str, Any], report: ExportReport) -> dict[str, Any]:
    """Return what an export says of itself, in either format, and what the check found."""
    details = content["quantization"]
    return {
        "algorithm": details["quant_algo"],
        "kv_cache_algorithm": details.get("kv_cache_quant_algo"),
        "producer": content["producer"],
        "excluded": details.get("exclude_modules", []),
        "relative_error": describe_errors(report),
        "kv_scales": report.kv_scales,
    }


def _part(context: StepContext, number: int) -> Callable[[int, int, str], None]:
    def tell(done: int, total: int, message: str) -> None:
        context.progress((0.9 if number else 0.0) + (0.1 if number else 0.9) * done / total, 1.0, message)

    return tell


def _peak_bytes(placement: Placement) -> int:
    """Return the most memory that this process took: of all its GPUs, or its main memory."""
    if placement.device == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
