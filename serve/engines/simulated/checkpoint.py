"""read_checkpoint: a model's shape and precisions, from the config.json of its Hugging Face checkpoint."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.core.strict_model import describe_mistakes
from serve.engines.simulated.hardware import Precision
from serve.engines.simulated.model_config import shape_from_config, text_config
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions
from serve.errors import ConfigError

# Beginnings of ModelOpt's `quant_algo`, the longest first.
_ALGORITHMS: dict[str, Precision] = {
    "W4A8_MXFP4": "mxfp4",
    "W4A16_MXFP4": "mxfp4",
    "W4A16_NVFP4": "fp4",
    "W4A8": "int4",
    "W4A16": "int4",
    "W8A16": "int8",
    "W8A8": "int8",
    "NVFP4": "fp4",
    "FP8": "fp8",
}
_ATTENTION = re.compile(r"(self_attn|attention|attn)[.*]*$")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's config.json tells.

    Attributes:
        shape: Of its decoder.
        precisions: Of its weights; of keys and values, bf16 unless it names another one.
        architecture: First of `architectures`, else the model type.
        is_quantized: Whether it cannot be quantized again.
    """

    shape: ModelShape
    precisions: Precisions
    architecture: str
    is_quantized: bool


def read_checkpoint(path: Path, remedy: str) -> Checkpoint:
    """Read what planning and the latency model need.

    Args:
        path: The checkpoint's directory, or its config.json.
        remedy: What else the user can do; ends the message of every error.

    Raises:
        ConfigError: There is no config.json, or it is not understood.
    """
    path = path if path.suffix == ".json" else path / "config.json"
    config = _read(path, remedy)
    quantization = path.with_name("hf_quant_config.json")
    if quantization.is_file():
        config = {**config, "quantization_config": _read(quantization, remedy).get("quantization", {})}
    try:
        return checkpoint_from_config(config)
    except ValidationError as exc:
        raise ConfigError(f"{describe_mistakes(exc, f'{path}: ')}\n{remedy}") from None
    except ValueError as exc:
        raise ConfigError(f"{path}: {exc}; {remedy}") from None


def checkpoint_from_config(config: Mapping[str, Any]) -> Checkpoint:
    """Return what a parsed config.json tells.

    Raises:
        ValueError: Something in it is not understood.
        pydantic.ValidationError: A number is missing or wrong.
    """
    shape = shape_from_config(config)
    quantization = text_config(config).get("quantization_config") or {}
    architecture = (config.get("architectures") or [text_config(config)["model_type"]])[0]
    return Checkpoint(shape, _precisions(quantization), architecture, bool(quantization))


def quantized_precisions(algorithm: str | None, kv_cache_algorithm: str | None) -> Precisions:
    """Return the precisions that ModelOpt's `quant_algo` and `kv_cache_quant_algo` mean; None: 16 bits.

    Raises:
        ValueError: The algorithm is not understood.
    """
    kv_cache = _kv_cache({"kv_cache_quant_algo": kv_cache_algorithm})
    return Precisions(weights="bf16" if algorithm is None else _weights({"quant_algo": algorithm}), kv_cache=kv_cache)


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}; {remedy}") from None
    except ValueError as exc:
        raise ConfigError(f"{path} is no JSON: {exc}; {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; {remedy}")
    return content


def _precisions(quantization: Mapping[str, Any]) -> Precisions:
    if not quantization:
        return Precisions()
    kept = [
        *(quantization.get("modules_to_not_convert") or ()),
        *(quantization.get("exclude_modules") or ()),
        *(quantization.get("ignore") or ()),
    ]
    return Precisions(
        weights=_weights(quantization),
        attention="bf16" if any(_ATTENTION.search(str(name)) for name in kept) else None,
        kv_cache=_kv_cache(quantization),
    )


def _weights(quantization: Mapping[str, Any]) -> Precision:
    method = str(quantization.get("quant_method") or "").lower()
    algorithm = str(quantization.get("quant_algo") or "").upper()
    for beginning, precision in _ALGORITHMS.items():
        if algorithm.startswith(beginning):
            return precision
    if method in ("fp8", "mxfp4"):
        return "fp8" if method == "fp8" else "mxfp4"
    if method in ("awq", "gptq"):
        return "int8" if int(quantization.get("bits") or 4) == 8 else "int4"
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        return _of_group(next(iter(groups.values())))
    raise ValueError(f"quantization_config with quant_method {method!r}, quant_algo {algorithm!r} is not understood")


def _of_group(group: Mapping[str, Any]) -> Precision:
    """Return the precision of a group of the compressed-tensors format."""
    weights = group.get("weights") or {}
    kind, bits = str(weights.get("type")), weights.get("num_bits") or 8
    match kind[:5], int(bits):
        case "float", 8:
            return "fp8"
        case "float", 4:
            return "fp4"
        case "int", 8:
            return "int8"
        case "int", 4:
            return "int4"
    raise ValueError(f"weights of type {kind!r} with {bits} bits are not understood")


def _kv_cache(quantization: Mapping[str, Any]) -> Precision:
    algorithm = str(quantization.get("kv_cache_quant_algo") or "").upper()
    scheme = quantization.get("kv_cache_scheme") or {}
    if algorithm == "NVFP4":
        return "fp4"
    fp8 = algorithm == "FP8" or (str(scheme.get("type", "")).startswith("float") and scheme.get("num_bits") == 8)
    return "fp8" if fp8 else "bf16"
