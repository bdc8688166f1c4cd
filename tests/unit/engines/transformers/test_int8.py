"""Weights in 8 bits: what is computed with them, what they take of memory, and which checkpoints are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from serve.engines.transformers.int8_linear import Int8Linear, Scratch
from serve.engines.transformers.loading import load_model
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError
from tests.unit.engines.transformers.int8_model import make_int8
from tests.unit.engines.transformers.tiny_model import make_tiny_model

CPU = TransformersSettings(device="cpu", tokens_per_block=8, kv_cache_tokens=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_int8(make_tiny_model(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("int8"))


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 40), (7,)])
@pytest.mark.parametrize("outputs", [48, 5000])  # in one piece, and in several
def test_a_layer_multiplies_with_what_its_weights_stand_for(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], outputs: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Int8Linear(nn.Linear(256, outputs, bias=True, dtype=dtype), Scratch())
    weight = torch.randint(-127, 128, (outputs, 256), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, generator=generator) / 256
    layer.fill(weight, scale)
    hidden = torch.randn(*shape, 256, generator=generator).to(dtype)
    with torch.no_grad():
        expected = nn.functional.linear(hidden.float(), weight.float() * scale[:, None], layer.bias.float())
        computed = layer(hidden)
    assert (computed.dtype, computed.shape) == (dtype, expected.shape)
    assert (computed.float() - expected).norm() <= tolerance * expected.norm()


def test_what_is_made_in_inference_works_outside_of_it() -> None:
    layer = Int8Linear(nn.Linear(8, 4), Scratch())
    layer.fill(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))
    with torch.inference_mode():
        inside = layer(torch.ones(8))
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(8)), inside.clone())


def test_weights_stay_in_8_bits(checkpoint: Path) -> None:
    model = load_model(checkpoint, CPU).model
    kept = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(kept) == 14
    assert {layer.weight.dtype for layer in kept.values()} == {torch.int8}
    assert not any(name in f"{parameter}." for name in kept for parameter, _ in model.named_parameters())


class TwoRanks:
    """Stands where a group of two ranks does; what they exchange is added up by the test."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world_size, self.device = rank, 2, torch.device("cpu")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_tensor_ranks_have_parts_of_the_weights_and_of_their_scales(checkpoint: Path) -> None:
    whole = load_model(checkpoint, CPU).model
    halves = [load_model(checkpoint, CPU, TwoRanks(rank)).model for rank in (0, 1)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, layer in whole.named_modules():
        if not isinstance(layer, Int8Linear):
            continue
        parts = [half.get_submodule(name) for half in halves]
        assert all(isinstance(part, Int8Linear) for part in parts)
        hidden = torch.randn(3, layer.in_features, generator=generator)
        with torch.no_grad():
            expected = layer(hidden)
            if name.endswith(("o_proj", "down_proj")):  # each has some of the inputs, and adds its part
                inputs = hidden.chunk(2, -1)
                computed = sum(part(piece) for part, piece in zip(parts, inputs, strict=True))
            else:
                computed = torch.cat([part(hidden) for part in parts], -1)
        assert torch.allclose(torch.as_tensor(computed), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_algo": "FP8", "kv_cache_quant_algo": None}, r"\(FP8\).*engine: trtllm.*int8_weight_only"),
        ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, r"\(NVFP4, KV cache FP8\)"),
        ({"quant_algo": "W8A16", "kv_cache_quant_algo": "FP8"}, r"\(W8A16, KV cache FP8\)"),
    ],
)
@pytest.mark.parametrize("file", ["hf_quant_config.json", "config.json"])
def test_what_needs_tensorrt_llm_is_refused(
    checkpoint: Path, tmp_path: Path, quantization: dict[str, Any], says: str, file: str
) -> None:
    model = copied(checkpoint, tmp_path)
    if file == "config.json":
        (model / "hf_quant_config.json").unlink()
        config = json.loads((model / file).read_text())
        content = {**config, "quantization_config": {"quant_method": "modelopt", **quantization}}
    else:
        content = {"quantization": quantization}
    (model / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=says):
        load_model(model, CPU)


def test_config_json_alone_will_do(checkpoint: Path, tmp_path: Path) -> None:
    model = copied(checkpoint, tmp_path)
    (model / "hf_quant_config.json").unlink()
    assert any(isinstance(module, Int8Linear) for module in load_model(model, CPU).model.modules())


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.layers.1.mlp.up_proj.weight_scale", None, "no scale for each row"),
        ("model.layers.1.mlp.up_proj.weight_scale", lambda scale: scale[:-1], "no scale for each row"),
        ("model.layers.1.mlp.up_proj.weight", lambda weight: weight[:, :-8], "does not fit config.json"),
        ("model.layers.1.mlp.up_proj.weight", None, "missing keys"),
    ],
)
def test_files_that_are_broken(checkpoint: Path, tmp_path: Path, name: str, change: Any, says: str) -> None:
    model = copied(checkpoint, tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=says):
        load_model(model, CPU)


def test_a_file_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    model = copied(checkpoint, tmp_path)
    (model / "hf_quant_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json cannot be read"):
        load_model(model, CPU)
