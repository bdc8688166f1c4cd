"""Quantized checkpoints in numpy: which ones each backend loads, and what their tensors stand for.

Unified checkpoints (`hf_quant_config.json`) are loaded by both backends, SmoothQuant by neither, AWQ by PyTorch alone;
checkpoints of the TensorRT backend's own format (`rank<N>.safetensors`) by it alone. Scales that a backend does not
read are what makes the difference upstream, too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

PYTORCH = ("FP8", "NVFP4", "W4A16_AWQ", "W8A16")
TENSORRT_UNIFIED = ("FP8", "NVFP4")
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def algorithms(directory: Path) -> dict[str, Any]:
    """Return `quantization` of hf_quant_config.json; empty: the checkpoint is not quantized."""
    path = directory / "hf_quant_config.json"
    if not path.is_file():
        return {}
    details: dict[str, Any] = json.loads(path.read_text())["quantization"]
    if details.get("quant_algo") is None:
        raise ValueError("Pre-quantized checkpoint must have quant_algo.")
    return details


def check_algorithm(directory: Path, known: tuple[str, ...]) -> dict[str, Any]:
    """Refuse what a backend has no kernels for."""
    details = algorithms(directory)
    if details and details["quant_algo"] not in known:
        raise ValueError(f"unsupported quant mode: {details['quant_algo']}")
    return details


def fp8(codes: Any) -> Any:
    """Return the values of E4M3: four bits of exponent, three of mantissa, no infinities."""
    codes = np.asarray(codes, np.uint8)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 0x0F, codes & 0x07
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.int32) - 7)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return np.where((codes & 0x7F) == 0x7F, np.nan, values).astype(np.float32)


def make_whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return weights in float32 from the tensors of a unified checkpoint."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    for name in tensors:
        if name.endswith(".weight_scale"):
            layer = name.removesuffix(".weight_scale")
            whole[f"{layer}.weight"] = _whole(
                tensors[f"{layer}.weight"],
                tensors[name],
                tensors.get(f"{layer}.weight_scale_2"),
                tensors.get(f"{layer}.pre_quant_scale"),
            )
    return whole


_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")


def _whole(weight: Any, scale: Any, scale_2: Any, smooth: Any) -> Any:
    if scale_2 is not None:
        codes = np.stack((weight & 0x0F, weight >> 4), 2).reshape(len(weight), -1)
        values = _E2M1[codes] * np.repeat(scale * scale_2, 16, 1)
    elif weight.dtype == np.uint8:
        values = _int4(weight) * np.repeat(scale, weight.shape[1] // scale.shape[1], 1)
    else:
        values = weight.astype(np.float32) * np.reshape(scale, (-1, 1))
    return values.astype(np.float32) if smooth is None else (values * smooth).astype(np.float32)


def _int4(packed: Any) -> Any:
    values = np.stack((packed & 0x0F, packed >> 4), 1).reshape(-1, packed.shape[1]).astype(np.int32)
    return np.where(values > 7, values - 16, values)


def join_ranks(ranks: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Return weights by the names of Hugging Face from the rank files of a TensorRT-LLM checkpoint."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    tensors = {"model.embed_tokens.weight": _joined(ranks, "transformer.vocab_embedding.weight", 0)}
    tensors["model.norm.weight"] = ranks[0]["transformer.ln_f.weight"]
    tensors["lm_head.weight"] = _joined(ranks, "lm_head.weight", 0)[: config["vocab_size"]]
    for index in range(config["num_hidden_layers"]):
        ours, theirs = f"transformer.layers.{index}.", f"model.layers.{index}."
        tensors[f"{theirs}input_layernorm.weight"] = ranks[0][f"{ours}input_layernorm.weight"]
        tensors[f"{theirs}post_attention_layernorm.weight"] = ranks[0][f"{ours}post_layernorm.weight"]
        cut = [heads * size // len(ranks), (heads + kv_heads) * size // len(ranks)]
        parts = [np.split(_layer(rank, f"{ours}attention.qkv"), cut) for rank in ranks]
        for name, pieces in zip("qkv", zip(*parts, strict=True), strict=True):
            tensors[f"{theirs}self_attn.{name}_proj.weight"] = np.concatenate(pieces)
        for name, other, axis in (
            ("attention.dense", "self_attn.o_proj", 1),
            ("mlp.fc", "mlp.gate_proj", 0),
            ("mlp.gate", "mlp.up_proj", 0),
            ("mlp.proj", "mlp.down_proj", 1),
        ):
            tensors[f"{theirs}{other}.weight"] = np.concatenate([_layer(rank, ours + name) for rank in ranks], axis)
    return tensors


def _layer(rank: dict[str, Any], name: str) -> Any:
    weight, scale = rank[f"{name}.weight"], rank.get(f"{name}.weights_scaling_factor")
    if scale is None:
        return weight
    packed = weight.view(np.uint8) if scale.ndim == 2 else weight
    return _whole(packed, scale, None, rank.get(f"{name}.prequant_scaling_factor"))


def _joined(ranks: list[dict[str, Any]], name: str, axis: int) -> Any:
    parts = [rank[name] for rank in ranks if name in rank]
    same = len(parts) > 1 and np.array_equal(parts[0], parts[1])
    return parts[0] if same or len(parts) == 1 else np.concatenate(parts, axis)
