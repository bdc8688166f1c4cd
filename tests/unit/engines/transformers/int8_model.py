"""Checkpoints with weights in 8 bits, and the same weights whole, for tests of the transformers engine."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from builders.quantize.config_files import inline_quantization, weight_only_quantization, write_config
from builders.quantize.config_files import write_quantization as write_file
from builders.quantize.layers import linear_layers, quantized_layers
from builders.quantize.tensor_files import TensorReader
from builders.quantize.weight_only import write_weight_only


def make_int8(source: Path, target: Path) -> Path:
    """Write a checkpoint's weights in 8 bits, as the builders do."""
    target.mkdir(exist_ok=True)
    with TensorReader(source) as reader:
        layers = quantized_layers(reader.names, linear_layers(source), ())
        write_weight_only(reader, layers, target, lambda *_: None)
    quantization = weight_only_quantization(["lm_head"])
    write_file(target, quantization)
    write_config(source, target, inline_quantization(quantization))
    return target


def make_whole(int8: Path, target: Path) -> Path:
    """Write what 8-bit weights stand for, in float32."""
    target.mkdir(exist_ok=True)
    tensors = load_file(int8 / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".weight_scale")}
    for name, scale in scales.items():
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight].float() * scale[:, None]
    save_file({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, target / "model.safetensors")
    config = json.loads((int8 / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    for side in int8.glob("tokenizer*"):
        shutil.copyfile(side, target / side.name)
    return target
