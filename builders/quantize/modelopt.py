"""NVIDIA ModelOpt: a model in 16 bits -> the same model with quantizers -> a checkpoint. The only user of ModelOpt.

Importing it takes several seconds, and it prints, warns and registers classes of the library's models while it works:
call these functions inside `quiet()`, in a process that ends with the step.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.export as mte
import modelopt.torch.quantization as mtq
import torch
import transformers

from builders.errors import BuildFailed
from builders.quantize.placement import Placement
from builders.quantize.recipes import presets
from builders.settings.quantize import QuantizeSettings

MODELOPT_VERSION = version("nvidia-modelopt")
# What it raises for models that it does not know; a RuntimeError is CUDA's, and may be an accident.
_DOES_NOT_KNOW = (NotImplementedError, AttributeError, TypeError, AssertionError, LookupError, ValueError)
_EXPERT = ".experts."
_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")


def load_source(directory: Path, placement: Placement, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """Load a checkpoint for quantization.

    Raises:
        BuildFailed: The library cannot, tensors are missing, or memory does not suffice.
    """
    device_map: Any = "auto" if placement.spread else {"": "cuda:0" if placement.device == "cuda" else "cpu"}
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as exc:
        raise _out_of_memory(exc) from exc
    except _DOES_NOT_KNOW as exc:
        raise BuildFailed(
            "quantize", f"transformers {transformers.__version__} cannot load {directory}: {exc}"
        ) from exc
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise BuildFailed("quantize", f"{directory} lacks tensors that its model has: {', '.join(missing[:4])}")
    return model.eval()


def make_config(settings: QuantizeSettings) -> dict[str, Any]:
    """Return ModelOpt's configuration of a recipe. Later entries of its list come before earlier ones."""
    names = presets(settings)
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, names[0]))
    for name in names[1:]:
        config["quant_cfg"] += copy.deepcopy(getattr(mtq, name))["quant_cfg"]
    if settings.recipe == "int4_awq":
        for entry in config["quant_cfg"]:
            blocks = (entry.get("cfg") or {}).get("block_sizes")
            if blocks is not None:
                blocks[-1] = settings.group_size
    # Not the quantizers of keys and values, which all layers have or none.
    config["quant_cfg"] += [
        {"quantizer_name": f"{pattern}.*{quantizer}*", "enable": False}
        for pattern in settings.exclude
        for quantizer in _QUANTIZERS
    ]
    return config


def quantize(model: Any, settings: QuantizeSettings, calibrate: Callable[[Any], None]) -> list[str]:
    """Insert quantizers, and calibrate them.

    Args:
        model: Changed in place.
        settings: The recipe.
        calibrate: Runs the model over the texts.

    Returns:
        What an operator should know.

    Raises:
        BuildFailed: ModelOpt does not know the model, memory does not suffice, or a range is not finite.
    """
    try:
        mtq.quantize(model, make_config(settings), calibrate)
    except torch.OutOfMemoryError as exc:
        raise _out_of_memory(exc) from exc
    except _DOES_NOT_KNOW as exc:
        if layer := _find_overflow(model, calibrate):
            raise _overflow(model, layer) from exc
        raise _not_known(model, settings, exc) from exc
    unseen = 0
    for name, quantizer in _quantizers(model):
        amax = getattr(quantizer, "_amax", None)
        if amax is not None and not torch.isfinite(amax.float()).all():
            raise _overflow(model, name.rpartition(".")[0])
        unseen += amax is None and _EXPERT in name and "input_quantizer" in name
    if not unseen:
        return []
    return [f"No calibration text reached {unseen} inputs of experts; they take others' ranges. Use more samples."]


def export_unified(model: Any, settings: QuantizeSettings, directory: Path) -> None:
    """Write a unified checkpoint; the model cannot be used afterwards.

    Raises:
        BuildFailed: ModelOpt does not know the model.
    """
    try:
        with torch.no_grad():
            mte.export_hf_checkpoint(model, export_dir=directory, max_shard_size="5GB")
    except torch.OutOfMemoryError as exc:
        raise _out_of_memory(exc) from exc
    except _DOES_NOT_KNOW as exc:
        raise _not_known(model, settings, exc) from exc


def export_tensorrt_llm(
    model: Any, settings: QuantizeSettings, decoder: str, directory: Path, tensor: int, pipeline: int
) -> None:
    """Write a checkpoint for the TensorRT backend, cut into ranks; the model cannot be used afterwards.

    Raises:
        BuildFailed: ModelOpt does not know the model.
    """
    try:
        with torch.no_grad():
            mte.export_tensorrt_llm_checkpoint(
                model,
                decoder,
                model.dtype,
                export_dir=directory,
                inference_tensor_parallel=tensor,
                inference_pipeline_parallel=pipeline,
            )
    except torch.OutOfMemoryError as exc:
        raise _out_of_memory(exc) from exc
    except _DOES_NOT_KNOW as exc:
        raise _not_known(model, settings, exc) from exc


class _NotFinite(Exception):
    """A layer that gets values that are not finite."""


def _find_overflow(model: Any, calibrate: Callable[[Any], None]) -> str | None:
    """Return the first layer with such weights or inputs; ModelOpt notices, and does not say where."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return str(name)
    for _, quantizer in _quantizers(model):
        quantizer.disable()

    def look(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
        if isinstance(arguments[0], torch.Tensor) and not torch.isfinite(arguments[0]).all():
            raise _NotFinite(name)

    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "input_quantizer")]
    hooks = [module.register_forward_pre_hook(functools.partial(look, name)) for name, module in layers]
    try:
        calibrate(model)
    except _NotFinite as exc:
        return str(exc)
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _overflow(model: Any, layer: str) -> BuildFailed:
    return BuildFailed(
        "quantize",
        f"{layer} has values that are not finite: activations overflow {str(model.dtype).removeprefix('torch.')}, or "
        "the weights are broken; use a checkpoint in bfloat16, or fetch it again",
    )


def _quantizers(model: Any) -> Iterator[tuple[str, Any]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if "quantizer" in name.rpartition(".")[2] and getattr(module, "is_enabled", False)
    )


def _not_known(model: Any, settings: QuantizeSettings, exc: Exception) -> BuildFailed:
    return BuildFailed(
        "quantize",
        f"ModelOpt {MODELOPT_VERSION} cannot make {settings.recipe} of {type(model).__name__} "
        f"({type(exc).__name__}: {exc}); use another recipe (quantize.recipe), or none",
    )


def _out_of_memory(exc: Exception) -> BuildFailed:
    return BuildFailed(
        "quantize",
        f"the GPU's memory does not suffice ({str(exc).partition('.')[0]}); use more GPUs, device: cpu, or shorter "
        "calibration texts (quantize.calibration.max_tokens)",
    )
