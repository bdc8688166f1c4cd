"""What keeps a bundle from being loaded on a node, and that both sides are named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.check import check_requirements
from serve.artifacts.manifest import Requirements
from serve.artifacts.node_facts import GpuFacts, NodeFacts
from serve.errors import BundleCorrupt, BundleMismatch

GIB = 2**30
H100 = GpuFacts(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=80 * GIB)
L4 = GpuFacts(name="NVIDIA L4", compute_capability="8.9", memory_bytes=23 * GIB)
FACTS = NodeFacts(
    gpus=(H100, H100),
    driver="570.86.15",
    cuda="12.8",
    machine="x86_64",
    libraries={"tensorrt_llm": "1.2.1", "torch": "2.9.0+cu130", "transformers": "4.57.3"},
)
REQUIRES: dict[str, Any] = {
    "gpus": 2,
    "gpu_name": H100.name,
    "compute_capability": "9.0",
    "gpu_memory_bytes": 80 * GIB,
    "min_driver": "565.57",
    "machine": "x86_64",
    "libraries": {"tensorrt-llm": "==1.2.1", "torch": ">=2.9"},
}


def test_the_node_that_a_bundle_was_made_on_may_load_it() -> None:
    check_requirements(Requirements(**REQUIRES), FACTS)
    check_requirements(Requirements(), NodeFacts(machine="aarch64"))


@pytest.mark.parametrize(
    ("requires", "facts", "both"),
    [
        ({}, {"gpus": (L4, L4)}, [H100.name, L4.name]),
        ({"gpu_name": None}, {"gpus": (L4, L4)}, ["capability 9.0", "NVIDIA L4 has 8.9"]),
        (
            {"gpu_name": None, "compute_capability": None, "min_compute_capability": "10.0"},
            {},
            ["10.0 or newer", "has 9.0"],
        ),
        ({"gpu_memory_bytes": 94 * GIB}, {}, ["94.0 GiB", "80.0 GiB"]),
        ({}, {"gpus": (H100,)}, ["takes 2 GPUs", "1 may be used"]),
        ({}, {"gpus": ()}, ["takes 2 GPUs", "0 may be used (none)"]),
        ({"min_driver": "580.65.06"}, {}, ["580.65.06", "570.86.15"]),
        ({}, {"driver": None}, ["565.57", "this node has none"]),
        ({"libraries": {"tensorrt_llm": "==1.4.0rc1"}}, {}, ["tensorrt_llm ==1.4.0rc1", "1.2.1 is installed"]),
        ({"libraries": {"tensorrt_llm": ">=1.3,<1.5"}}, {}, ["tensorrt_llm >=1.3,<1.5", "1.2.1 is installed"]),
        ({"libraries": {"transformer-engine": ">=2"}}, {}, ["transformer-engine >=2", "not installed"]),
        ({"machine": "aarch64"}, {}, ["aarch64 processors", "this node has x86_64"]),
    ],
)
def test_a_difference_is_refused_with_both_sides(
    requires: dict[str, Any], facts: dict[str, Any], both: list[str]
) -> None:
    with pytest.raises(BundleMismatch) as caught:
        check_requirements(Requirements(**REQUIRES | requires), FACTS.model_copy(update=facts), subject="bundle x@3")
    message = str(caught.value)
    assert message.startswith("bundle x@3 cannot be loaded here: ")
    assert all(side in message for side in both), message


def test_every_difference_is_told_at_once_and_equal_gpus_once() -> None:
    with pytest.raises(BundleMismatch) as caught:
        check_requirements(Requirements(**REQUIRES), NodeFacts(gpus=(L4, L4), machine="aarch64"))
    message = str(caught.value)
    assert message.count("has 'NVIDIA L4'") == 1
    for what in ("x86_64", "driver", "tensorrt-llm", "torch", "GiB"):
        assert what in message


@pytest.mark.parametrize(
    ("wanted", "installed", "good"),
    [
        (">=1.3", "1.4.0rc1", True),  # the newest line has release candidates only
        ("==1.4.0rc1", "1.4.0rc1", True),
        ("==2.9.0", "2.9.0+cu130", True),  # the local part says for which CUDA it was compiled
        ("==1.2.*", "1.2.1", True),
        ("==1.2.*", "1.3.0", False),
        ("!=1.2.0,<1.3", "1.2.0", False),
    ],
)
def test_versions_are_compared_as_pip_does(wanted: str, installed: str, good: bool) -> None:
    requires = Requirements(libraries={"tensorrt_llm": wanted})
    facts = NodeFacts(machine="x86_64", libraries={"tensorrt-llm": installed})
    if good:
        check_requirements(requires, facts)
    else:
        with pytest.raises(BundleMismatch):
            check_requirements(requires, facts)


@pytest.mark.parametrize("requires", [{"libraries": {"torch": "newest"}}, {"min_driver": "new"}])
def test_requirements_without_sense_are_the_bundles_fault(requires: dict[str, Any]) -> None:
    with pytest.raises(BundleCorrupt, match=r"'newest'|'new'"):
        check_requirements(Requirements(**requires), FACTS)


def test_ranks_of_several_nodes_need_their_own_share_of_the_gpus() -> None:
    requires = Requirements(**REQUIRES | {"gpus": 4})
    check_requirements(requires, FACTS, gpus=2)
    with pytest.raises(BundleMismatch, match="takes 4 GPUs"):
        check_requirements(requires, FACTS)


@given(share=st.floats(0.5, 1.5))
def test_two_percent_less_memory_is_the_same_gpu(share: float) -> None:
    requires = Requirements(gpus=1, gpu_memory_bytes=80 * GIB)
    gpu = H100.model_copy(update={"memory_bytes": int(80 * GIB * share)})
    facts = NodeFacts(gpus=(gpu,), machine="x86_64")
    if share >= 0.981:
        check_requirements(requires, facts)
    elif share <= 0.979:
        with pytest.raises(BundleMismatch, match="GiB"):
            check_requirements(requires, facts)
