"""Every recipe, for real, of the quickstart model on the CPU. ModelOpt is imported once, by this module's process."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, Qwen3MoeConfig
from transformers.utils import logging as library_logging

from builders.context import StepInput
from builders.errors import BuildFailed
from builders.quantize.quiet import quiet
from builders.steps import compile as compile_step
from serve.errors import ConfigError
from tests.doubles.install import installed
from tests.unit.builders.compile.steps import make_context
from tests.unit.builders.quantize.steps import FEW, QUICKSTART, Made, run_step

RECIPES: dict[str, dict[str, Any]] = {
    "int8_weight_only": {"quantize": "int8_weight_only"},
    "fp8": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "fp8", "calibration": FEW}},
    "fp8 of a part, KV fp8": {
        "kind": "trtllm-checkpoint",
        "quantize": {
            "recipe": "fp8",
            "kv_cache": "fp8",
            "exclude": ["lm_head", "model.layers.0", "*.down_proj"],
            "calibration": FEW,
        },
    },
    "nvfp4": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "nvfp4", "calibration": FEW}},
    "int4_awq": {"kind": "trtllm-checkpoint", "quantize": {"recipe": "int4_awq", "group_size": 64, "calibration": FEW}},
    "smoothquant for an engine": {
        "kind": "tensorrt-engine",
        "parallel": {"tensor": 2},
        "quantize": {"recipe": "int8_smoothquant", "calibration": FEW},
    },
}
Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a recipe when it is first asked for."""
    torch.set_num_threads(1)
    library_logging.disable_progress_bar()
    made: dict[str, Made] = {}

    def make_once(name: str) -> Made:
        if name not in made:
            made[name] = run_step(tmp_path_factory.mktemp("step"), **RECIPES[name])
        return made[name]

    return make_once


@pytest.mark.parametrize(
    ("name", "algorithm", "error", "share"),
    [
        ("int8_weight_only", "W8A16", 0.01, 0.62),
        ("fp8", "FP8", 0.03, 0.62),
        ("nvfp4", "NVFP4", 0.11, 0.45),
        ("int4_awq", "W4A16_AWQ", 0.14, 0.45),
    ],
)
def test_a_unified_checkpoint_is_near_its_source(
    make: Make, name: str, algorithm: str, error: float, share: float
) -> None:
    made = make(name)
    assert made.result["algorithm"] == algorithm
    assert made.result["format"] == "unified"
    assert 0 < made.result["relative_error"]["mean"] < error
    assert len(made.result["relative_error"]["layers"]) == 28
    assert made.result["size_bytes"] < share * made.result["source_bytes"]
    described = json.loads((made.directory / "hf_quant_config.json").read_text())
    assert described["quantization"]["quant_algo"] == algorithm
    assert described["producer"] == made.result["producer"]
    assert described["producer"]["version"]


@pytest.mark.parametrize("name", ["int8_weight_only", "fp8"])
def test_all_but_the_weights_stays_the_source_s(make: Make, name: str) -> None:
    directory = make(name).directory
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "modelopt"
    assert config == json.loads((QUICKSTART / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (directory / file).read_bytes() == (QUICKSTART / file).read_bytes()
    source, export = load_file(QUICKSTART / "model.safetensors"), load_file(directory / "model.safetensors")
    for tensor in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.3.input_layernorm.weight"):
        assert torch.equal(source[tensor], export[tensor])


def test_excluded_modules_stay_whole_and_the_kv_cache_has_scales_in_every_layer(make: Make) -> None:
    made = make("fp8 of a part, KV fp8")
    tensors = load_file(made.directory / "model.safetensors")
    whole = {name for name, tensor in tensors.items() if tensor.dtype == torch.float16 and name.endswith("proj.weight")}
    assert {name for name in whole if ".layers.0." in name} == {
        f"model.layers.0.{part}.weight"
        for part in [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    }
    assert {name for name in whole if ".layers.0." not in name} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)
    }
    scales = [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]
    assert len(scales) == made.result["kv_scales"] == 8
    assert made.result["kv_cache_algorithm"] == "FP8"


def test_int8_weights_are_those_that_modelopt_makes(make: Make, tmp_path: Path) -> None:
    with quiet():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float16)
        export_hf_checkpoint(mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG, None), export_dir=tmp_path)
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (tmp_path, make("int8_weight_only").directory)
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype for name in ours)
    described = [
        json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        for folder in (tmp_path, make("int8_weight_only").directory)
    ]
    assert described[0] == described[1]


def test_the_same_inputs_give_the_same_bytes(make: Make, tmp_path: Path) -> None:
    for name in ("int8_weight_only", "fp8"):
        again = run_step(tmp_path / name, **RECIPES[name])
        assert digests(again.directory) == digests(make(name).directory)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_tensorrt_backend_s_format_has_a_file_for_each_rank(make: Make) -> None:
    made = make("smoothquant for an engine")
    assert made.result["format"] == "tensorrt-llm"
    assert sorted(path.name for path in made.directory.iterdir()) == [
        "config.json",
        "rank0.safetensors",
        "rank1.safetensors",
    ]
    config = json.loads((made.directory / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"
    assert config["rotary_base"] == 10_000
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert config["quantization"]["quant_algo"] == made.result["algorithm"] == "W8A8_SQ_PER_CHANNEL"
    halves = [load_file(made.directory / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert halves[0]["transformer.layers.0.mlp.fc.weight"].shape == (256, 256)
    assert not torch.equal(*(half["transformer.layers.0.mlp.fc.weight"] for half in halves))
    assert 0 < made.result["relative_error"]["mean"] < 0.03


def test_an_engine_is_built_from_it_and_its_weights_are_near_the_source_s(make: Make, tmp_path: Path) -> None:
    """The double reads the format in its own way, so that names, cuts and scales are as another reader takes them."""
    name = "smoothquant for an engine"
    quantized = StepInput("1" * 64, make(name).directory, make(name).result)
    with installed("1.2.x"):
        context = make_context(tmp_path, quantized, compile={"max_batch_size": 4}, **RECIPES[name])
        compile_step.run(context)
    (context.output / "model/rank0.engine").rename(tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    source = load_file(QUICKSTART / "model.safetensors")
    for tensor in [tensor for tensor in source if tensor.endswith("proj.weight")]:
        original = source[tensor].float()
        assert (weights[tensor] - original).norm() < 0.15 * original.norm()


def test_progress_goes_up_to_its_end_and_says_what_is_done(make: Make) -> None:
    for name in ("fp8", "int8_weight_only"):
        shares = [done / total for done, total, _ in make(name).progress]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert all(message for _, _, message in make(name).progress)


def test_a_simulation_says_so(make: Make) -> None:
    assert "simulates" in make("fp8").result["notes"][0]
    assert make("int8_weight_only").result["notes"] == []


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_step(tmp_path, **RECIPES["fp8"])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_experts(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    source = a_model(config, tmp_path / "source")
    for kind, recipe in (("transformers-checkpoint", "int8_weight_only"), ("trtllm-checkpoint", "fp8")):
        made = run_step(tmp_path / recipe, source, kind=kind, quantize={"recipe": recipe, "calibration": FEW})
        layers = made.result["relative_error"]["layers"]
        assert len([name for name in layers if ".experts." in name]) == 12
        assert not any(name.endswith("mlp.gate") for name in layers)
    with pytest.raises(BuildFailed, match=r"ModelOpt .* cannot make int4_awq of Qwen3MoeForCausalLM.*another recipe"):
        run_step(
            tmp_path / "awq", source, kind="trtllm-checkpoint",
            quantize={"recipe": "int4_awq", "group_size": 64, "calibration": FEW},
        )  # fmt: skip


def a_model(config: Any, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((QUICKSTART / file).read_bytes())
    return directory


def changed(directory: Path, **tensors: Any) -> Path:
    directory.mkdir()
    for file in QUICKSTART.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    content = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        content[name.replace("__", ".")].view(-1)[0] = value
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["int8_weight_only", "fp8"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    source = changed(tmp_path / "source", model__layers__1__mlp__up_proj__weight=float("nan"))
    with pytest.raises(BuildFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*has values that are not finite"):
        run_step(tmp_path / "step", source, **RECIPES[name])


def test_activations_that_overflow_name_the_layer(tmp_path: Path) -> None:
    source = changed(tmp_path / "source", model__layers__1__mlp__up_proj__weight=60000.0)
    with pytest.raises(BuildFailed, match=r"layers\.1\.mlp\.down_proj has values .* overflow float16"):
        run_step(tmp_path / "step", source, **RECIPES["fp8"])


@pytest.mark.parametrize(
    ("quantize", "says"),
    [
        ({"recipe": "fp8", "exclude": ["model.layers.9"]}, r"quantize\.exclude: 'model\.layers\.9' matches no module"),
        ({"recipe": "fp8", "device": "cuda"}, r"quantize\.device: 'cuda' was asked for"),
        ({"recipe": "fp8", "calibration": {"file": "none.jsonl"}}, r"none\.jsonl"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_settings_that_do_not_fit(tmp_path: Path, quantize: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, BuildFailed), match=says):
        run_step(tmp_path, kind="trtllm-checkpoint", quantize={"calibration": FEW, **quantize})


def test_groups_that_do_not_divide_a_layer_are_refused_before_the_calibration(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=2, moe_intermediate_size=64,
    )  # fmt: skip
    source = a_model(config, tmp_path / "source")
    with pytest.raises(ConfigError, match=r"groups of 128 inputs, and model\.layers\.0\.\S+ has \d+; exclude it"):
        run_step(tmp_path / "step", source, kind="trtllm-checkpoint", quantize={"recipe": "int4_awq"})


def test_a_source_that_is_quantized_already_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantized already"):
        run_step(tmp_path, make("fp8").directory, quantize="int8_weight_only")


def test_a_model_without_linear_layers_to_quantize(tmp_path: Path) -> None:
    source = a_model(MambaConfig(vocab_size=4096, hidden_size=64, num_hidden_layers=1), tmp_path / "source")
    with pytest.raises(BuildFailed, match="no layer was quantized"):
        run_step(tmp_path / "step", source, quantize={"recipe": "int8_weight_only", "exclude": ["backbone"]})
