"""Which launcher starts an engine, and what it reserves."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from serve.core.parallel import ParallelLayout
from serve.core.placement import NodeResources, PlacementError, PlacementPlan, check_feasible
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.workers.cluster import mpi_works_in_cluster
from serve.workers.launch import check_fallback, check_launch, plan_launch
from serve.workers.settings import RankResources

TWO_NODES = ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2)


def plan(engine: Any, mpi: bool | None = True, resources: RankResources | None = None, **layout: Any) -> PlacementPlan:
    return plan_launch(engine, ParallelLayout(**layout), resources or RankResources(), mpi_works=lambda: mpi)


def test_one_rank_is_the_replica_itself() -> None:
    assert plan(SimulatedSettings(), resources=RankResources(num_cpus=0.05)).bundles == ({"CPU": 0.05},)
    for engine, gpus in ((TransformersSettings(), 0), (SimulatedSettings(), 0), (TrtllmSettings(), 1)):
        found = plan(engine)
        assert found.launcher == "in_process"
        assert len(found.bundles) == 1
        assert found.bundles[0].get("GPU", 0) == gpus


@pytest.mark.parametrize("engine", [TransformersSettings(), SimulatedSettings()])
def test_several_ranks_of_our_engines_are_actors(engine: Any) -> None:
    found = plan(engine, tensor=2, resources=RankResources(num_gpus=1, num_cpus=3, replica_cpus=0.25))
    assert found.launcher == "torch_distributed"
    assert found.bundles == ({"CPU": 0.25}, {"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1})


@pytest.mark.parametrize(("mpi", "launcher"), [(True, "mpi"), (False, "ray")])
def test_one_node_takes_mpi_where_it_works(mpi: bool, launcher: str) -> None:
    assert plan(TrtllmSettings(), mpi, tensor=4).launcher == launcher


def test_several_nodes_take_ray_without_asking_for_mpi() -> None:
    def never() -> bool:
        raise AssertionError("the answer does not matter")

    found = plan_launch(TrtllmSettings(), TWO_NODES, RankResources(), mpi_works=never)
    assert found.launcher == "ray"
    assert [bundle["GPU"] for bundle in found.bundles] == [2, 2]


def test_mpi_that_does_not_work_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="MPI_Comm_spawn"):
        plan(TrtllmSettings(orchestrator="mpi"), False, tensor=2)


def test_mpi_that_is_not_known_yet_is_no_broken_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert plan(TrtllmSettings(orchestrator="mpi"), None, tensor=2).launcher == "mpi"
        assert not caplog.records
        assert plan(TrtllmSettings(), None, tensor=2).launcher == "ray"
    assert "no GPU node answered yet" in caplog.text


def test_without_a_gpu_node_the_room_is_missed_before_mpi_is() -> None:
    for orchestrator in ("auto", "mpi"):
        found = plan(TrtllmSettings(orchestrator=orchestrator), mpi_works_in_cluster(None), tensor=2)
        with pytest.raises(PlacementError, match="start Ray on GPU nodes"):
            check_feasible(found, [NodeResources("cpu", {"CPU": 64})])


@pytest.mark.parametrize("engine", [TrtllmSettings(), TransformersSettings(), SimulatedSettings()])
def test_a_rank_takes_no_second_gpu(engine: Any) -> None:
    with pytest.raises(ValueError, match=r"num_gpus=2: a rank takes one GPU.*parallel.tensor: 2"):
        check_launch(engine, ParallelLayout(), RankResources(num_gpus=2))
    for share in (0, 0.5, 1):
        check_launch(engine, ParallelLayout(), RankResources(num_gpus=share))


def test_a_compiled_engine_is_started_by_mpi(tmp_path: Path) -> None:
    config = {"pretrained_config": {"mapping": {"tp_size": 2, "world_size": 2}}, "build_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        (tmp_path / f"rank{rank}.engine").touch()
    layout = ParallelLayout(tensor=2)
    found = plan_launch(TrtllmSettings(), layout, RankResources(), mpi_works=lambda: False, model_dir=tmp_path)
    assert found.launcher == "mpi"


def test_resources_are_named_as_ray_names_them() -> None:
    resources = RankResources(num_cpus=2, num_gpus=1, memory_bytes=2**30, accelerator_type="H100", custom={"nvme": 1})
    assert resources.of_rank(0) == {"CPU": 2, "GPU": 1, "memory": 2**30, "nvme": 1, "accelerator_type:H100": 0.001}
    assert RankResources(num_cpus=0).of_rank(0) == {"CPU": 0}


def test_a_fallback_has_to_fit_one_node() -> None:
    check_fallback(TrtllmSettings(), ParallelLayout(tensor=2, pipeline=2))
    with pytest.raises(ValueError, match="gpus_per_node=2"):
        check_fallback(TrtllmSettings(), TWO_NODES)
