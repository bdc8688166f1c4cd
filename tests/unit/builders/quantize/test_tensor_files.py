"""Files of tensors, the layers that are quantized, and the TensorRT backend's format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builders.errors import BuildFailed
from builders.quantize.layers import check_exclude, is_kept, linear_layers, quantized_layers
from builders.quantize.tensor_files import TensorReader, TensorWriter, weight_bytes
from builders.quantize.tensorrt_checkpoint import add_rotary, check_ranks, decoder_of, rotary_of
from builders.quantize.weight_only import quantize_rows
from serve.core.parallel import ParallelLayout
from serve.errors import ConfigError
from tests.unit.builders.quantize.steps import QUICKSTART

TENSORS = {f"t{number}": torch.full((100,), float(number)) for number in range(10)}


def write(directory: Path, shard_bytes: int) -> None:
    directory.mkdir()
    writer = TensorWriter(directory, shard_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()


@pytest.mark.parametrize(("shard_bytes", "files"), [(10_000, 1), (1_200, 4), (1, 10)])
def test_shards_are_read_as_one_and_by_the_library_s_names(tmp_path: Path, shard_bytes: int, files: int) -> None:
    write(tmp_path / "a", shard_bytes)
    weights = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert weights == (
        ["model.safetensors"]
        if files == 1
        else [f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)]
    )
    with TensorReader(tmp_path / "a") as reader:
        assert {name: reader.tensor(name).tolist() for name in reader.names} == {
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }
        assert reader.shape("t3") == (100,)
    assert weight_bytes(tmp_path / "a") > 4000
    write(tmp_path / "b", shard_bytes)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_pickles_are_read_as_tensors_only(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with TensorReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("t7"), TENSORS["t7"])
    torch.save({"t": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        TensorReader(tmp_path)


def test_files_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
        TensorReader(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        TensorReader(tmp_path)


@given(arrays.arrays("float32", (3, 8), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_rows_are_rounded_to_within_half_a_step(values: Any) -> None:
    weight = torch.from_numpy(values)
    rounded, scale = quantize_rows(weight)
    assert (scale > 0).all()
    step = scale[:, None]
    assert ((rounded.float() * step - weight).abs() <= step * 0.5001 + 1e-37).all()


def test_layers_of_the_quickstart_model() -> None:
    linears = linear_layers(QUICKSTART)
    with TensorReader(QUICKSTART) as reader:
        chosen = quantized_layers(reader.names, linears, ["model.layers.1", "*.o_proj"])
    assert len(chosen) == 3 * 6
    assert not any(".layers.1." in name or name.endswith("o_proj") for name in chosen)


def test_names_may_lack_their_first_part_and_experts_have_names_of_their_own() -> None:
    names = [
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.experts.3.w1.weight",
        "layers.0.mlp.gate.weight",
        "layers.0.norm.weight",
        "embed.weight",
    ]
    linears = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"}
    assert quantized_layers(names, linears, ()) == ("layers.0.mlp.experts.3.w1", "layers.0.mlp.up_proj")


def test_a_pattern_means_a_module_and_what_is_below_but_no_longer_name() -> None:
    assert is_kept("model.layers.1.mlp.up_proj", ["model.layers.1"])
    assert not is_kept("model.layers.10.mlp.up_proj", ["model.layers.1"])
    assert is_kept("lm_head", ())


def test_patterns_that_match_nothing_are_named() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    check_exclude(names, ["lm_head", "model.layers.0", "*.up_proj", "*mlp*"])
    with pytest.raises(ConfigError, match=r"'model\.layer\.0' matches no module"):
        check_exclude(names, ["model.layer.0"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 500000.0}, (500000.0, None)),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, None)),
        ({}, (10000.0, None)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            (5e5, {"rope_type": "llama3", "type": "llama3", "factor": 8.0}),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
            (5e5, {"rope_type": "llama3", "type": "llama3", "factor": 8.0}),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (10000.0, {"type": "linear", "factor": 2.0})),
    ],
)
def test_the_rotary_embedding_as_old_and_new_releases_write_it(config: dict[str, Any], expected: Any) -> None:
    assert rotary_of(config) == expected


def test_what_an_engine_is_told_of_the_rotary_embedding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "x", "rank": 1}')
    add_rotary(tmp_path, {"rope_theta": 5e5})
    assert json.loads((tmp_path / "config.json").read_text()) == {"architecture": "x", "rotary_base": 5e5}


ROWS, COLUMNS = 8, 16
SHAPES = {"self_attn.q_proj": (ROWS, COLUMNS), "self_attn.k_proj": (4, COLUMNS), "self_attn.v_proj": (4, COLUMNS),
          "self_attn.o_proj": (COLUMNS, ROWS), "mlp.gate_proj": (ROWS, COLUMNS)}  # fmt: skip
CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def cut_model(directory: Path, layout: ParallelLayout) -> TensorReader:
    """Write a source of two layers, and its quantized ranks as the TensorRT backend has them."""
    generator = torch.Generator().manual_seed(0)
    source = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator)
        for layer in (0, 1)
        for name, shape in SHAPES.items()
    }
    (directory / "source").mkdir()
    save_file(source, directory / "source/model.safetensors")
    each = 2 // layout.pipeline
    for rank in range(layout.world_size):
        tensors: dict[str, torch.Tensor] = {}
        tensor, stage = rank % layout.tensor, rank // layout.tensor
        for local in range(each):
            block = f"model.layers.{stage * each + local}"
            parts = {
                name: source[f"{block}.{name}.weight"].chunk(layout.tensor, 1 if name.endswith("o_proj") else 0)[tensor]
                for name in SHAPES
            }
            qkv = torch.cat([parts[f"self_attn.{name}_proj"] for name in "qkv"])
            for name, weight in (
                ("attention.qkv", qkv),
                ("attention.dense", parts["self_attn.o_proj"]),
                ("mlp.fc", parts["mlp.gate_proj"]),
            ):
                quantized, scale = quantize_rows(weight)
                prefix = f"transformer.layers.{local}.{name}"
                tensors |= {f"{prefix}.weight": quantized, f"{prefix}.weights_scaling_factor": scale}
        save_file(tensors, directory / f"rank{rank}.safetensors")
    return TensorReader(directory / "source")


def check(directory: Path, source: TensorReader, layout: ParallelLayout) -> dict[str, float]:
    return check_ranks(directory, source, CONFIG, layout, torch.device("cpu"), lambda *_: None).errors


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_each_rank_is_compared_with_its_part_of_the_source(tmp_path: Path, layout: tuple[int, int]) -> None:
    cut = ParallelLayout(tensor=layout[0], pipeline=layout[1])
    source = cut_model(tmp_path, cut)
    errors = check(tmp_path, source, cut)
    assert len(errors) == 6  # three layers of two blocks
    assert max(errors.values()) < 0.01


def test_ranks_that_are_missing_or_another_s_or_broken(tmp_path: Path) -> None:
    cut = ParallelLayout(tensor=2)
    source = cut_model(tmp_path, cut)
    with pytest.raises(BuildFailed, match=r"did not write rank2\.safetensors"):
        check(tmp_path, source, ParallelLayout(tensor=2, pipeline=2))
    own = load_file(tmp_path / "rank1.safetensors")
    save_file(load_file(tmp_path / "rank0.safetensors"), tmp_path / "rank1.safetensors")
    with pytest.raises(BuildFailed, match=r"of rank1\.safetensors differs from its original"):
        check(tmp_path, source, cut)
    name = "transformer.layers.0.mlp.fc.weights_scaling_factor"
    own[name][1] = float("nan")
    save_file(own, tmp_path / "rank1.safetensors")
    with pytest.raises(BuildFailed, match=r"mlp\.fc.* has 1 values that are no scales"):
        check(tmp_path, source, cut)


def test_models_whose_format_is_not_known() -> None:
    assert decoder_of("MistralForCausalLM", "int4_awq") == "llama"
    with pytest.raises(ConfigError, match=r"known for LlamaForCausalLM.*not for Phi3ForCausalLM; use fp8"):
        decoder_of("Phi3ForCausalLM", "int4_awq")


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, 2_000_000)
    for name, tensor in load_file(QUICKSTART / "model.safetensors").items():
        writer.add(name, tensor)
    writer.finish()
    (tmp_path / "config.json").write_bytes((QUICKSTART / "config.json").read_bytes())
    own, other = (AutoModelForCausalLM.from_pretrained(path) for path in (QUICKSTART, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
