"""Candidates: what a GPU computes with, and how a model may be cut."""

import pytest

from builders.plan.candidates import candidates, quantizations, splits, tensor_sizes
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.known_models import MODELS
from tests.unit.builders.plan.requests import offer, request


@pytest.mark.parametrize(
    ("gpu", "kind", "recipes"),
    [
        ("a100-80gb", "trtllm-checkpoint", {"none", "int4_awq"}),
        ("a100-80gb", "tensorrt-engine", {"none", "int8_smoothquant", "int4_awq"}),
        ("l4", "trtllm-checkpoint", {"none", "fp8", "int4_awq"}),
        ("h100", "trtllm-checkpoint", {"none", "fp8", "int4_awq"}),
        ("b200", "trtllm-checkpoint", {"none", "fp8", "nvfp4", "int4_awq"}),
        ("rtx-5090", "trtllm-checkpoint", {"none", "fp8", "nvfp4", "int4_awq"}),
        ("h100", "transformers-checkpoint", {"none", "int8_weight_only"}),
    ],
)
def test_quantizations_follow_the_gpu_and_the_kind(gpu: str, kind: str, recipes: set[str]) -> None:
    asked = request(gpu=gpu, kind=BundleKind(kind))
    assert {recipe for recipe, _ in quantizations(asked, asked.offers[0])} == recipes


def test_fp8_keys_and_values_need_ada_and_a_recipe() -> None:
    on = {gpu: request(gpu=gpu) for gpu in ("a100-80gb", "h100")}
    assert ("int4_awq", "fp8") not in quantizations(on["a100-80gb"], offer("a100-80gb"))
    assert ("int4_awq", "fp8") in quantizations(on["h100"], offer("h100"))
    assert ("none", "fp8") not in quantizations(on["h100"], offer("h100"))


def test_a_quantized_checkpoint_stays_as_it_is() -> None:
    asked = request("gpt-oss-20b", "b200")
    assert quantizations(asked, asked.offers[0]) == [("none", "auto")]
    assert {candidate.precisions.weights for candidate in candidates(asked)} == {"mxfp4"}


@pytest.mark.parametrize(
    ("model", "gpu", "sizes"),
    [
        ("llama-3.1-8b", "h100", [1, 2, 4, 8]),
        ("llama-3.1-8b", "h100-nvl", [1, 2]),  # a bridge joins two
        ("llama-3.1-8b", "gb200", [1, 2, 4, 8, 16]),  # one NVLink domain of 72; two ranks hold each key-value head
        ("qwen2.5-7b", "h100", [1, 2, 4]),  # 28 heads
        ("qwen2.5-14b", "h100", [1, 2, 4, 8]),  # 40 heads
        ("phi-4", "h100", [1, 2]),  # 10 key-value heads
        ("qwen3-30b-a3b", "h100", [1, 2, 4, 8]),  # 4 key-value heads, copied for 8
        ("deepseek-v3", "h100", [1, 2, 4, 8]),
    ],
)
def test_tensor_ranks_divide_heads_inside_a_domain(model: str, gpu: str, sizes: list[int]) -> None:
    assert tensor_sizes(MODELS[model], offer(gpu)) == sizes


def test_stages_go_across_nodes_and_ranks_do_not() -> None:
    found = list(splits(MODELS["llama-3.1-405b"], offer("h100"), BundleKind.TRTLLM_CHECKPOINT, None))
    across = [split for split in found if split.world_size > 8]
    assert across
    assert all(split.tensor <= 8 and split.gpus_per_node == 8 for split in across)
    assert not any(split.tensor_across_nodes for split in found)
    wide = [s for s in splits(MODELS["llama-3.1-8b"], offer("gb200"), BundleKind.TRTLLM_CHECKPOINT, 16) if s.tensor > 4]
    assert all(split.tensor_across_nodes and split.gpus_per_node == 4 for split in wide)


def test_experts_are_cut_into_whole_tiles_or_kept_whole() -> None:
    def kept(model: str, tensor: int) -> set[tuple[int | None, bool]]:
        found = splits(MODELS[model], offer("h100"), BundleKind.TRTLLM_CHECKPOINT, None)
        return {(split.expert, split.attention_dp) for split in found if split.tensor == tensor}

    assert kept("mixtral-8x7b", 8) == {(None, False), (8, False), (8, True)}
    assert kept("qwen3-30b-a3b", 8) == {(8, False), (8, True)}  # 768 / 8 columns are less than a tile
    assert kept("llama-3.1-8b", 8) == {(None, False)}


def test_no_candidate_takes_more_gpus_than_there_are() -> None:
    assert max(candidate.split.world_size for candidate in candidates(request(max_gpus=4))) == 4


def test_the_transformers_engine_has_tensor_parallelism_only() -> None:
    found = list(splits(MODELS["llama-3.1-8b"], offer("h100"), BundleKind.TRANSFORMERS_CHECKPOINT, None))
    assert {split.pipeline for split in found} == {1}
    assert max(split.tensor for split in found) == 8


def test_layouts_have_short_names() -> None:
    layouts = {candidate.layout for candidate in candidates(request("deepseek-v3", "h200", max_gpus=16))}
    assert {"TP8", "TP8 EP8", "TP8 EP8 DP", "TP8 PP2"} <= layouts
