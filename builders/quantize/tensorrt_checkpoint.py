"""The TensorRT backend's own checkpoint format: what ModelOpt's export of it lacks, and a check. Needs PyTorch.

config.json         architecture, dtype, quantization, mapping; `rank<N>.safetensors` for each rank
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from builders.errors import BuildFailed
from builders.source.selection import CONFIG
from serve.core.parallel import ParallelLayout
from serve.errors import ConfigError

# ModelOpt's word for models whose checkpoints were compared with the format's documentation.
_DECODERS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
_DEFAULT_ROTARY_BASE = 10_000.0


def decoder_of(architecture: str, recipe: str) -> str:
    """Return ModelOpt's word for a model.

    Raises:
        ConfigError: The format is not known for it.
    """
    decoder = _DECODERS.get(architecture)
    if decoder is None:
        raise ConfigError(
            f"quantize.recipe: {recipe!r} for the TensorRT backend is known for {', '.join(_DECODERS)}, not for "
            f"{architecture}; use fp8, or kind: trtllm-checkpoint"
        )
    return decoder


def add_rotary(directory: Path, source_config: Mapping[str, Any]) -> None:
    """Add base and scaling of the rotary embedding to config.json.

    ModelOpt leaves them out where TensorRT-LLM is not installed, or the library names them in a new way; without
    them an engine computes with a base of 10,000, whatever the model was trained with.

    Args:
        directory: Of the checkpoint.
        source_config: The source's config.json.
    """
    path = directory / CONFIG
    config = json.loads(path.read_bytes())
    base, scaling = rotary_of(source_config)
    config["rotary_base"] = base
    if scaling is not None:
        config["rotary_scaling"] = scaling
    config.pop("rank", None)  # the export leaves that of the last file here
    path.write_text(json.dumps(config, indent=2) + "\n")


def rotary_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return base and scaling of the rotary embedding, as old and new releases of the library write them."""
    parameters = config.get("rope_parameters") or {}
    base = config.get("rope_theta", parameters.get("rope_theta", _DEFAULT_ROTARY_BASE))
    scaling = config.get("rope_scaling") or {key: value for key, value in parameters.items() if key != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"
    return float(base), None if kind == "default" else {**scaling, "type": kind}


def check_ranks(directory: Path, layout: ParallelLayout) -> int:
    """Check that each rank has its file, and every scale is one.

    Returns:
        How many quantized weights rank 0 has.

    Raises:
        BuildFailed: Otherwise; names the tensor.
    """
    counts = [_check_rank(directory / f"rank{rank}.safetensors") for rank in range(layout.world_size)]
    if not counts[0]:
        raise BuildFailed("quantize", "no layer was quantized; look at quantize.exclude")
    return counts[0]


def _check_rank(path: Path) -> int:
    if not path.is_file():
        raise BuildFailed("quantize", f"ModelOpt did not write {path.name}; check parallel against the model's heads")
    count = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            if name.endswith("scaling_factor"):
                values = file.get_tensor(name).float()
                if not (torch.isfinite(values) & (values > 0)).all() or not math.prod(values.shape):
                    raise BuildFailed("quantize", f"{name} of {path.name} has values that are no scales")
                count += name.endswith("weights_scaling_factor")
    return count
