"""Whether a cluster can run a build, and what it is said to have if not."""

from typing import Any

import pytest

from builders.cluster_room import check_accelerator, check_room
from builders.context import StepName
from builders.graph import BuildFacts, BuildGraph, make_graph
from builders.spec import parse_spec
from serve.artifacts.node_facts import NodeFacts
from serve.core.placement import NodeResources
from serve.errors import ConfigError

GIB = 2**30
FACTS = NodeFacts(machine="x86_64")
HEAD = NodeResources("aaaaaaaabbbb", {"CPU": 16.0, "memory": 32.0 * GIB})
H100 = NodeResources("ccccccccdddd", {"CPU": 96.0, "GPU": 8.0, "memory": 900.0 * GIB, "accelerator_type:H100": 1.0})


def graph(**changes: Any) -> BuildGraph:
    spec = parse_spec({"name": "m", "kind": "trtllm-checkpoint", "quantize": "fp8"} | changes)
    return make_graph(spec, BuildFacts("a", FACTS, FACTS, dict.fromkeys(StepName, 1)))


def test_a_cluster_with_room_is_good() -> None:
    built = graph(target={"accelerator": "H100", "num_cpus": 8}, parallel={"tensor": 8})
    check_accelerator(built.spec.target, [HEAD, H100])
    check_room(built, [HEAD, H100])


def test_a_cluster_without_the_gpus_lists_what_it_has() -> None:
    with pytest.raises(
        ConfigError,
        match=r"target.accelerator: no node has 'B200'. The cluster has node aaaaaaaa: 16 CPU, 32 GiB memory, GPU type "
        r"none; node cccccccc: 8 GPU, 96 CPU, 900 GiB memory, GPU type H100. Name a type",
    ):
        check_accelerator(graph(target={"accelerator": "B200"}).spec.target, [HEAD, H100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"num_cpus": 97}}, r"step reference: it takes 97 CPU of one node"),
        ({"target": {"memory_bytes": 1000 * GIB}}, r"step reference: it takes 1 CPU, 1e\+03 GiB memory of one node"),
        ({"target": {"accelerator": "H100"}, "parallel": {"tensor": 16}}, r"step reference: it takes 16 GPU"),
        (
            {"target": {"accelerator": "H100"}, "parallel": {"tensor": 8, "pipeline": 2, "gpus_per_node": 8}},
            r"step reference: it takes 2 nodes with 8 GPU",
        ),
    ],
)
def test_a_step_that_never_fits_is_named_with_what_there_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message + r".*and no node has room.*The cluster has node aaaaaaaa"):
        check_room(graph(**changes), [HEAD, H100])


def test_an_empty_cluster_is_told() -> None:
    with pytest.raises(ConfigError, match="The cluster has no node"):
        check_room(graph(), [])
