"""What stands beside the weights of a quantized checkpoint: config.json and hf_quant_config.json. PURE but for files.

config.json stays the source's, so that any reader understands it as it did before: the library would write its own,
which older releases (TensorRT-LLM 1.2.x has transformers 4.57) read without the base of the rotary embedding.
"""

import json
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from builders.source.selection import CONFIG, tokenizer_files

QUANTIZATION = "hf_quant_config.json"
GENERATION = "generation_config.json"
_PRODUCER = "raytrt"


def weight_only_quantization(kept: Collection[str]) -> dict[str, Any]:
    """Return the content of hf_quant_config.json for int8 weights with a scale for each output channel.

    Args:
        kept: Modules that were not quantized.
    """
    return {
        "producer": {"name": _PRODUCER, "version": _own_version()},
        "quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None, "exclude_modules": sorted(kept)},
    }


def _own_version() -> str:
    try:
        return version(_PRODUCER)
    except PackageNotFoundError:  # a checkout that is not installed
        return "0"


def inline_quantization(quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json that belongs to int8 weights, as ModelOpt writes it."""
    details = quantization["quantization"]
    return {
        "ignore": details["exclude_modules"],
        "quant_algo": details["quant_algo"],
        "producer": quantization["producer"],
        "quant_method": "modelopt",
    }


def write_config(source: Path, target: Path, inline: dict[str, Any], dtype: str | None = None) -> None:
    """Write config.json: the source's, and what the weights are quantized with.

    Args:
        source: Directory of the source.
        target: Directory that is made.
        inline: The `quantization_config`.
        dtype: Of the tensors that are not quantized; None: as in the source.
    """
    config = json.loads((source / CONFIG).read_bytes())
    config["quantization_config"] = inline
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    _write(target / CONFIG, config)


def write_quantization(target: Path, quantization: dict[str, Any]) -> None:
    """Write hf_quant_config.json."""
    _write(target / QUANTIZATION, quantization)


def copy_side_files(source: Path, names: Collection[str], target: Path) -> None:
    """Copy the tokenizer, chat template and defaults of generation, so that the directory is a whole checkpoint.

    Args:
        source: Directory of the source.
        names: Its files that count.
        target: Directory that is made.
    """
    for name in (*tokenizer_files(names), *({GENERATION} & set(names))):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
