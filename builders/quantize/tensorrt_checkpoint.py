"""The TensorRT backend's own checkpoint format: what ModelOpt's export of it lacks, and a check. Needs PyTorch.

config.json         architecture, dtype, quantization, mapping; `rank<N>.safetensors` for each rank
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from builders.errors import BuildFailed
from builders.quantize.dequantize import effective_weight
from builders.quantize.export_check import MAX_RELATIVE_ERROR, ExportReport, relative_error
from builders.quantize.tensor_files import TensorReader
from builders.source.selection import CONFIG
from serve.core.parallel import ParallelLayout
from serve.errors import ConfigError

# ModelOpt's word for models whose checkpoints were compared with the format's documentation.
_DECODERS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}
_DEFAULT_ROTARY_BASE = 10_000.0
_SCALED = re.compile(r"(?P<layer>transformer\.layers\.(?P<index>\d+)\.(?P<part>\w+\.\w+))\.weights_scaling_factor")
# Ours -> the format's.
_TENSORS = {
    "weight": "weight",
    "weight_scale": "weights_scaling_factor",
    "pre_quant_scale": "prequant_scaling_factor",
    "input_scale": "activation_scaling_factor",
}
# The format's layers, and those of the source that they are made of, one below the other.
_LAYERS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


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


def check_ranks(
    directory: Path,
    source: TensorReader,
    config: Mapping[str, Any],
    layout: ParallelLayout,
    device: torch.device,
    progress: Callable[[int, int, str], None],
) -> ExportReport:
    """Load each rank's file back, and compare its layers with the source's.

    Args:
        directory: Of the checkpoint.
        source: The unquantized checkpoint.
        config: Its config.json.
        layout: How the checkpoint is cut.
        device: Where to compute.
        progress: Told after each rank.

    Raises:
        BuildFailed: A file is missing, a scale is none, or a weight is far from its original.
    """
    errors: dict[str, float] = {}
    for rank in range(layout.world_size):
        path = directory / f"rank{rank}.safetensors"
        if not path.is_file():
            raise BuildFailed(
                "quantize", f"ModelOpt did not write {path.name}; check parallel against the model's heads"
            )
        with safe_open(path, framework="pt") as file:
            for layer, name, error in _rank_errors(file, source, config, layout, rank, device):
                if error > MAX_RELATIVE_ERROR:
                    raise BuildFailed(
                        "quantize",
                        f"{name} of {path.name} differs from its original by {error:.0%}, more than rounding can "
                        "explain; report this",
                    )
                errors[layer] = max(error, errors.get(layer, 0.0))
        progress(rank + 1, layout.world_size, f"checking {path.name}")
    if not errors:
        raise BuildFailed("quantize", "no layer was quantized; look at quantize.exclude")
    return ExportReport(errors, 0)


def _rank_errors(
    file: Any,
    source: TensorReader,
    config: Mapping[str, Any],
    layout: ParallelLayout,
    rank: int,
    device: torch.device,
) -> Iterator[tuple[str, str, float]]:
    """Yield the source's layer, the rank's name of it, and how far it is from what it was made of."""
    first = _first_layer(int(config["num_hidden_layers"]), layout, rank)
    for name in file.keys():  # noqa: SIM118  # it is no mapping
        match = _SCALED.fullmatch(name)
        if match is None:
            continue
        part = match["part"]
        tensors = {
            ours: file.get_tensor(f"{match['layer']}.{theirs}").to(device)
            for ours, theirs in _TENSORS.items()
            if f"{match['layer']}.{theirs}" in file.keys()  # noqa: SIM118
        }
        if tensors["weight_scale"].dim() == 2:  # two outputs in a byte
            tensors["weight"] = tensors["weight"].view(torch.uint8)
        found = effective_weight(name, tensors)
        block = f"model.layers.{first + int(match['index'])}"
        pieces = [
            _piece(source.tensor(f"{block}.{layer}.weight"), layer, config, layout.tensor, rank % layout.tensor)
            for layer in _LAYERS[part]
        ]
        original = torch.cat(pieces).to(device).float()
        if found.shape != original.shape:
            raise BuildFailed("quantize", f"{name}: {tuple(found.shape)}, but the source has {tuple(original.shape)}")
        yield f"{block}.{_LAYERS[part][0]}", name, relative_error(found, original)


def _piece(weight: torch.Tensor, layer: str, config: Mapping[str, Any], count: int, index: int) -> torch.Tensor:
    """Return a tensor rank's part of a weight: rows of outputs, or columns of inputs."""
    axis = 1 if layer in ("self_attn.o_proj", "mlp.down_proj") else 0
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    if layer in ("self_attn.k_proj", "self_attn.v_proj") and heads < count:  # then ranks share a head
        count, index = heads, index * heads // count
    size = weight.shape[axis] // count
    return weight.narrow(axis, index * size, size)


def _first_layer(layers: int, layout: ParallelLayout, rank: int) -> int:
    """Return the first layer of a rank's pipeline stage; its names begin with 0 again."""
    return layers // layout.pipeline * (rank // layout.tensor)
