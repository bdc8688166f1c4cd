"""What the Ray launcher decides without a cluster; tests/integration/test_ray_orchestrator.py has one."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.core.parallel import ParallelLayout
from serve.core.placement import plan_placement
from serve.engines.trtllm.ray_import import mend_ray_import
from serve.errors import ConfigError
from serve.workers.launchers.local_models import resolve
from serve.workers.launchers.ray_orchestrator import check_workers

PLAN = plan_placement(ParallelLayout(tensor=2), "ray", replica={"CPU": 1}, rank={"GPU": 1, "CPU": 1})


@pytest.mark.parametrize("visible", ["GPU-1a2b", "MIG-3c", "0,GPU-1a2b"])
def test_trap_4_3_gpus_named_by_uuid_are_refused(visible: str) -> None:
    with pytest.raises(ConfigError, match=r"names GPUs by UUID or MIG id.*use orchestrator: mpi"):
        check_workers(PLAN, visible)


@pytest.mark.parametrize("visible", ["", "0", "0,1", " 2, 3"])
def test_numbers_of_gpus_and_no_mask_are_accepted(visible: str) -> None:
    check_workers(PLAN, visible)


def test_trap_4_2_each_rank_needs_a_whole_cpu() -> None:
    small = plan_placement(ParallelLayout(tensor=2), "ray", replica={"CPU": 1}, rank={"GPU": 1, "CPU": 0.5})
    with pytest.raises(ConfigError, match=r"resources\.num_cpus=0\.5"):
        check_workers(small, "")


def test_trap_7_4_24_the_executor_of_1_2_can_be_imported_with_a_newer_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    # The attribute `placement_group` of ray.util is a function; imports find the module of that name all the same.
    module = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(module, "PlacementGroupSchedulingStrategy", None, raising=False)
    monkeypatch.delattr(module, "PlacementGroupSchedulingStrategy")
    mend_ray_import()
    there: dict[str, object] = {}
    exec("from ray.util.placement_group import PlacementGroupSchedulingStrategy", there)
    assert there["PlacementGroupSchedulingStrategy"] is PlacementGroupSchedulingStrategy


def test_trap_4_3b_a_directory_is_what_it_says(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert resolve([str(tmp_path), str(missing)]) == (
        {str(tmp_path): str(tmp_path)},
        [f"{missing}: there is no such directory; copy the checkpoint there, to the same path on every node"],
    )


def test_trap_4_3b_an_id_of_the_hub_is_downloaded_to_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name: f"/cache/{name}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve(["org/model"]) == ({"org/model": "/cache/org/model"}, [])


def test_trap_4_3b_an_id_that_cannot_be_downloaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise ConnectionError("no network")

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve(["org/model"]) == (
        {},
        ["org/model: cannot be downloaded (ConnectionError: no network); give a local directory"],
    )
