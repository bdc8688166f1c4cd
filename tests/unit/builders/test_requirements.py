"""What a bundle requires of nodes, and that the node that made it has it."""

from typing import Any

import pytest

from builders.requirements import requirements
from builders.spec import BuildSpec, parse_spec
from serve.artifacts.check import check_requirements
from serve.artifacts.manifest import Quantization
from serve.artifacts.node_facts import GpuFacts, NodeFacts
from serve.errors import BundleMismatch

H100 = GpuFacts(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=85 * 10**9)
LIBRARIES = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "tensorrt_llm": "1.2.1", "tensorrt": "10.13.3.9"}
NODE = NodeFacts(gpus=(H100, H100), driver="575.57.08", cuda="12.9", machine="x86_64", libraries=LIBRARIES)


def spec(**changes: Any) -> BuildSpec:
    return parse_spec({"name": "m", "target": {"accelerator": "H100"}} | changes)


ENGINE = {"kind": "tensorrt-engine", "quantize": "fp8"}
CHECKPOINT = {"kind": "trtllm-checkpoint", "quantize": "fp8"}


@pytest.mark.parametrize("changes", [ENGINE, CHECKPOINT, {}, {"target": {}}, ENGINE | {"target": {}}])
def test_the_node_that_made_it_can_load_it(changes: dict[str, Any]) -> None:
    check_requirements(requirements(spec(**changes), Quantization(algorithm="FP8"), NODE), NODE)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"gpus": (H100.model_copy(update={"name": "NVIDIA H200"}),)}, "H200"),
        ({"driver": "570.10"}, "570.10"),
        ({"libraries": LIBRARIES | {"tensorrt_llm": "1.2.2"}}, "1.2.2"),
        ({"libraries": LIBRARIES | {"tensorrt": "10.14.0"}}, "10.14.0"),
        ({"machine": "aarch64"}, "aarch64"),
        ({"gpus": ()}, "GPU"),
    ],
)
def test_a_compiled_engine_runs_where_it_was_built_only(node: dict[str, Any], message: str) -> None:
    required = requirements(spec(**ENGINE), Quantization(algorithm="FP8"), NODE)
    with pytest.raises(BundleMismatch, match=message):
        check_requirements(required, NODE.model_copy(update=node))


@pytest.mark.parametrize(
    ("quantization", "recipe", "capability"),
    [
        (Quantization(algorithm="FP8"), "fp8", "8.9"),
        (Quantization(algorithm="NVFP4"), "nvfp4", "10.0"),
        (Quantization(algorithm="W4A16_AWQ"), "int4_awq", "8.0"),
        (Quantization(algorithm="W4A16_AWQ", kv_cache_algorithm="FP8"), "int4_awq", "8.9"),
        (Quantization(algorithm="NVFP4"), "none", "10.0"),  # the source was quantized before
        (Quantization(), "none", "8.0"),
    ],
)
def test_a_checkpoint_needs_gpus_with_its_arithmetic(quantization: Quantization, recipe: str, capability: str) -> None:
    required = requirements(spec(kind="trtllm-checkpoint", quantize=recipe), quantization, NODE)
    assert required.min_compute_capability == capability
    assert required.gpu_name is None


@pytest.mark.parametrize(
    ("found", "good"), [("1.2.0", True), ("1.2.1", True), ("1.4.0rc1", True), ("1.1.0", False), ("1.3.0", True)]
)
def test_a_checkpoint_is_loaded_by_both_lines_of_the_library(found: str, good: bool) -> None:
    required = requirements(spec(**CHECKPOINT), Quantization(algorithm="FP8"), NODE)
    node = NODE.model_copy(update={"libraries": LIBRARIES | {"tensorrt_llm": found}})
    if good:
        check_requirements(required, node)
    else:
        with pytest.raises(BundleMismatch, match="tensorrt_llm"):
            check_requirements(required, node)


def test_the_gpus_of_all_ranks_are_required() -> None:
    required = requirements(spec(parallel={"tensor": 2}, **CHECKPOINT), Quantization(), NODE)
    assert (required.gpus, required.gpu_memory_bytes) == (2, H100.memory_bytes)
