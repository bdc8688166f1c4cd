"""The quickstart model in FP8, written out here so that no test of engines needs ModelOpt."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from builders.context import StepInput
from tests.unit.builders.compile.steps import QUICKSTART


def make_fp8(directory: Path, *, kv_cache: bool = False) -> StepInput:
    """Write a unified checkpoint with a scale for each weight; return what the quantize step would tell of it."""
    directory.mkdir()
    tensors = load_file(QUICKSTART / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].float().abs().amax() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"], tensors[name.replace("weight", "input_scale")] = scale, torch.tensor(0.01)
        if kv_cache and name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name.replace("weight", f"{name[-13]}_scale")] = torch.tensor(0.02)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    kv_algorithm = "FP8" if kv_cache else None
    details = {"quant_algo": "FP8", "kv_cache_quant_algo": kv_algorithm, "exclude_modules": ["lm_head"]}
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": details}))
    (directory / "config.json").write_bytes((QUICKSTART / "config.json").read_bytes())
    return StepInput("1" * 64, directory, {"algorithm": "FP8", "kv_cache_algorithm": kv_algorithm, "format": "unified"})
