"""What quantized tensors stand for, and which exports are refused. No ModelOpt: the packing is written out here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders.errors import BuildFailed
from builders.quantize.dequantize import effective_weight
from builders.quantize.export_check import ExportReport, check_export
from builders.quantize.tensor_files import TensorReader
from builders.quantize.weight_only import quantize_rows

OUTPUTS, INPUTS = 6, 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.post_attention_layernorm.weight"


def codes(high: int) -> torch.Tensor:
    return torch.randint(0, high, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_8_bits() -> None:
    weight = (codes(255).int() - 127).to(torch.int8)
    scale = torch.linspace(0.1, 0.6, OUTPUTS)
    found = effective_weight(LAYER, {"weight": weight, "weight_scale": scale})
    assert torch.equal(found, weight.float() * scale[:, None])


def test_fp8_with_one_scale_or_one_for_each_output() -> None:
    weight = torch.randn(OUTPUTS, INPUTS).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.linspace(0.1, 0.6, OUTPUTS)):
        found = effective_weight(LAYER, {"weight": weight, "weight_scale": scale})
        assert torch.equal(found, weight.float() * scale.reshape(-1, 1))


def test_awq_has_two_outputs_in_a_byte_and_a_scale_for_each_group() -> None:
    values = codes(16).int() - 8
    packed = ((values[0::2] & 15) | ((values[1::2] & 15) << 4)).to(torch.uint8)
    scale = torch.rand(OUTPUTS, 2) + 0.1
    smooth = torch.rand(INPUTS) + 0.5
    found = effective_weight(LAYER, {"weight": packed, "weight_scale": scale, "pre_quant_scale": smooth})
    assert torch.equal(found, values.float() * scale.repeat_interleave(INPUTS // 2, 1) * smooth)


def test_nvfp4_has_two_inputs_in_a_byte_and_scales_of_two_levels() -> None:
    nibbles = codes(16)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    scale = (torch.rand(OUTPUTS, INPUTS // 16) + 0.5).to(torch.float8_e4m3fn)
    found = effective_weight(LAYER, {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.25)})
    values = torch.tensor(E2M1)[nibbles.int()]
    assert torch.allclose(found, values * scale.float().repeat_interleave(16, 1) * 0.25)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none(scale: float) -> None:
    weight, scales = quantize_rows(torch.randn(OUTPUTS, INPUTS))
    scales[2] = scale
    with pytest.raises(BuildFailed, match=rf"{LAYER}\.weight_scale has 1 values that are no scales"):
        effective_weight(LAYER, {"weight": weight, "weight_scale": scales})


def test_scales_that_do_not_fit() -> None:
    weight, scales = quantize_rows(torch.randn(OUTPUTS, INPUTS))
    with pytest.raises(BuildFailed, match=r"a scale of \(5,\) does not fit a weight of \(6, 32\)"):
        effective_weight(LAYER, {"weight": weight, "weight_scale": scales[:5]})


def checkpoint(directory: Path, **tensors: torch.Tensor) -> TensorReader:
    directory.mkdir(exist_ok=True)
    content = {name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, directory / "model.safetensors")
    return TensorReader(directory)


def layer(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    quantized, scale = quantize_rows(weight)
    return {f"{LAYER}.weight": quantized, f"{LAYER}.weight_scale": scale}


def check(tmp_path: Path, source: dict[str, torch.Tensor], export: dict[str, torch.Tensor]) -> ExportReport:
    readers = checkpoint(tmp_path / "source", **source), checkpoint(tmp_path / "export", **export)
    return check_export(*readers, CPU, lambda *_: None)


def test_an_honest_export(tmp_path: Path) -> None:
    weight, norm = torch.randn(OUTPUTS, INPUTS), torch.ones(INPUTS)
    report = check(tmp_path, {f"{LAYER}.weight": weight, NORM: norm}, {**layer(weight), NORM: norm})
    assert 0 < report.mean == report.worst[1] < 0.01


def test_a_norm_may_have_taken_over_what_inputs_are_multiplied_with(tmp_path: Path) -> None:
    weight, norm, smooth = torch.randn(OUTPUTS, INPUTS), torch.rand(INPUTS) + 0.5, torch.rand(INPUTS) * 9 + 0.5
    source = {f"{LAYER}.weight": weight, NORM: norm}
    report = check(tmp_path, source, {**layer(weight / smooth), NORM: norm * smooth})
    assert report.worst[1] < 0.1
    with pytest.raises(BuildFailed, match="more than rounding can explain"):
        check(tmp_path, source, {**layer(weight / smooth), NORM: norm})


def test_a_weight_that_is_another_one(tmp_path: Path) -> None:
    weight = torch.randn(OUTPUTS, INPUTS)
    with pytest.raises(BuildFailed, match=rf"{LAYER} differs from its original by \d+%"):
        check(tmp_path, {f"{LAYER}.weight": weight}, layer(-weight))


def test_a_tensor_that_was_lost(tmp_path: Path) -> None:
    weight = torch.randn(OUTPUTS, INPUTS)
    with pytest.raises(BuildFailed, match=rf"1 tensors of the source are not in the export: {NORM}"):
        check(tmp_path, {f"{LAYER}.weight": weight, NORM: torch.ones(3)}, layer(weight))


def test_a_head_that_is_tied_may_be_left_out(tmp_path: Path) -> None:
    weight, embeddings = torch.randn(OUTPUTS, INPUTS), torch.randn(9, INPUTS)
    source = {f"{LAYER}.weight": weight, "model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.clone()}
    kept = {**layer(weight), "model.embed_tokens.weight": embeddings}
    assert check(tmp_path, source, kept).errors.keys() == {LAYER}
    with pytest.raises(BuildFailed, match=r"lm_head\.weight"):
        check(tmp_path, {**source, "lm_head.weight": embeddings + 1}, kept)


def test_an_export_without_quantized_layers(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": torch.randn(OUTPUTS, INPUTS)}
    with pytest.raises(BuildFailed, match=r"no layer was quantized; look at quantize\.exclude"):
        check(tmp_path, tensors, tensors)


def test_a_scale_of_keys_that_is_none(tmp_path: Path) -> None:
    weight = torch.randn(OUTPUTS, INPUTS)
    scales = {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.0)}
    with pytest.raises(BuildFailed, match=r"k_scale is 0\.0, which is no scale"):
        check(tmp_path, {f"{LAYER}.weight": weight}, {**layer(weight), **scales})
