"""A checkpoint tells its shape, and the precisions of its weights, keys and values."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve.engines.simulated.checkpoint import checkpoint_from_config, read_checkpoint
from serve.engines.simulated.known_models import CONFIGS, MODELS
from serve.engines.simulated.split import Precisions
from serve.errors import ConfigError

LLAMA = CONFIGS["llama-3.1-8b"]


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": weights}}}


def write(directory: Path, config: Any, name: str = "config.json") -> Path:
    (directory / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return directory


def test_directory_and_file_are_read_alike(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "architectures": ["LlamaForCausalLM"]})
    checkpoint = read_checkpoint(tmp_path, "help")
    assert checkpoint == read_checkpoint(tmp_path / "config.json", "help")
    assert (checkpoint.shape, checkpoint.architecture) == (MODELS["llama-3.1-8b"], "LlamaForCausalLM")
    assert (checkpoint.precisions, checkpoint.is_quantized) == (Precisions(), False)
    assert checkpoint_from_config(LLAMA).architecture == "llama"


@pytest.mark.parametrize(
    ("quantization", "weights", "attention", "kv_cache"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", None, "bf16"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}, "fp8", None, "fp8"),
        ({"quant_algo": "FP8_BLOCK_SCALES"}, "fp8", None, "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "fp4", None, "fp4"),
        ({"quant_algo": "NVFP4", "exclude_modules": ["model.layers.*.self_attn*"]}, "fp4", "bf16", "bf16"),
        ({"quant_algo": "W4A16_AWQ", "group_size": 128}, "int4", None, "bf16"),
        ({"quant_algo": "W4A8_AWQ"}, "int4", None, "bf16"),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, "int8", None, "bf16"),
        ({"quant_algo": "W8A16"}, "int8", None, "bf16"),
        ({"quant_method": "awq", "bits": 4}, "int4", None, "bf16"),
        ({"quant_method": "gptq", "bits": 8}, "int8", None, "bf16"),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
            "mxfp4",
            "bf16",
            "bf16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                **group(type="float", num_bits=8),
                "kv_cache_scheme": {"type": "float", "num_bits": 8},
            },
            "fp8",
            None,
            "fp8",
        ),
        ({**group(type="int", num_bits=4), "ignore": ["lm_head"]}, "int4", None, "bf16"),
        (group(type="int"), "int8", None, "bf16"),
        (group(type="float", num_bits=4), "fp4", None, "bf16"),
    ],
)
def test_a_quantized_checkpoint_tells_its_precisions(
    quantization: dict[str, Any], weights: Any, attention: Any, kv_cache: Any
) -> None:
    checkpoint = checkpoint_from_config({**LLAMA, "quantization_config": quantization})
    assert checkpoint.precisions == Precisions(weights=weights, attention=attention, kv_cache=kv_cache)
    assert checkpoint.is_quantized


def test_what_modelopt_writes_beside_the_config_counts(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    write(tmp_path, {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "hf_quant_config.json")
    assert read_checkpoint(tmp_path, "").precisions.weights == "fp8"


def test_a_part_of_a_model_may_be_quantized_on_its_own() -> None:
    whole = {"model_type": "llava", "quantization_config": {"quant_method": "fp8"}, "text_config": LLAMA}
    assert checkpoint_from_config(whole).precisions.weights == "fp8"


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (None, "config.json: No such file or directory; use --shape"),
        ("{", "config.json is no JSON: .*; use --shape"),
        ("[]", "config.json holds no JSON object; use --shape"),
        ({}, "(?s)model_type None is none of those .*; use --shape"),
        ({"model_type": "llama"}, r"(?s)config.json: .layers: .*\nuse --shape"),
        ({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'.* not understood; use"),
        ({**LLAMA, "quantization_config": {"quant_algo": "MIXED_PRECISION"}}, "'MIXED_PRECISION' is not understood"),
        ({**LLAMA, "quantization_config": group(type="int", num_bits=3)}, "3 bits"),
    ],
)
def test_a_checkpoint_that_is_not_understood_is_refused(tmp_path: Path, config: Any, complaint: str) -> None:
    if config is not None:
        write(tmp_path, config)
    with pytest.raises(ConfigError, match=complaint):
        read_checkpoint(tmp_path, "use --shape")
