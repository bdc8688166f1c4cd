"""Who starts the ranks, and in which environment; `trap_X_Y` refers to docs/trtllm-traps.md."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.construct import apply_environ
from serve.engines.trtllm.orchestration import (
    LAUNCH_PREFIXES,
    OrchestratorKind,
    choose_orchestrator,
    engine_environ,
    local_ranks,
)
from serve.errors import ConfigError

ONE = ParallelLayout()
FOUR = ParallelLayout(tensor=4)
TWO_NODES = ParallelLayout(tensor=2, pipeline=2, gpus_per_node=2)
KINDS: tuple[OrchestratorKind, ...] = ("in_process", "mpi", "ray")


def environ_of(
    kind: OrchestratorKind, inherited: dict[str, str], layout: ParallelLayout = FOUR, gpus: int | None = None
) -> dict[str, str]:
    changed = dict(inherited)
    apply_environ(engine_environ(kind, layout, inherited, gpus), changed)
    return changed


@pytest.mark.parametrize(
    ("layout", "mpi_spawns", "tensorrt", "kind"),
    [
        (ONE, False, False, "in_process"),
        (FOUR, True, False, "mpi"),
        (FOUR, False, False, "ray"),
        (TWO_NODES, True, False, "ray"),
        (FOUR, True, True, "mpi"),
    ],
)
def test_trap_4_5_the_layout_and_mpi_decide_who_starts_the_ranks(
    layout: ParallelLayout, mpi_spawns: bool, tensorrt: bool, kind: str
) -> None:
    assert choose_orchestrator("auto", layout, mpi_spawns, tensorrt) == kind


@pytest.mark.parametrize(
    ("asked", "layout", "mpi_spawns", "tensorrt", "message"),
    [
        ("in_process", FOUR, True, False, "in_process starts one rank, but parallel has 4"),
        ("mpi", TWO_NODES, True, False, "mpi starts ranks on one node only.*use ray"),
        ("mpi", FOUR, False, False, "MPI_Comm_spawn works, and that of this node does not; use ray"),
        ("ray", FOUR, True, True, "ray runs the PyTorch backend only; use mpi"),
        ("auto", TWO_NODES, True, True, "mpi starts ranks on one node only.*with the PyTorch backend"),
        ("auto", FOUR, False, True, "MPI_Comm_spawn works, and that of this node does not"),
    ],
)
def test_trap_4_4_what_cannot_start_the_ranks_is_refused_before_a_gpu_is_taken(
    asked: OrchestratorKind, layout: ParallelLayout, mpi_spawns: bool, tensorrt: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_orchestrator(asked, layout, mpi_spawns, tensorrt)


def test_trap_4_1_one_gpu_needs_no_spawned_worker() -> None:
    assert environ_of("in_process", {}, ONE)["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in environ_of("mpi", {"TLLM_WORKER_USE_SINGLE_PROCESS": "1"})


@pytest.mark.parametrize("kind", ["in_process", "mpi"])
def test_trap_7_1_5_a_variable_of_an_earlier_engine_does_not_make_this_one_a_ray_one(kind: OrchestratorKind) -> None:
    assert "TLLM_DISABLE_MPI" not in environ_of(kind, {"TLLM_DISABLE_MPI": "1"})


@pytest.mark.parametrize("kind", KINDS)
def test_trap_4_4_marks_of_a_launcher_are_removed(kind: OrchestratorKind) -> None:
    marks = {f"{prefix}X": "1" for prefix in LAUNCH_PREFIXES} | {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_MCA_orte_ess_num_procs": "4",
        "PMIX_RANK": "3",
        "SLURM_JOB_ID": "7",
        "tllm_mpi_size": "4",
        "TLLM_SPAWN_PROXY_PROCESS": "1",
    }
    assert not set(marks) & set(environ_of(kind, marks))


@pytest.mark.parametrize("kind", KINDS)
def test_trap_4_4_tuning_that_an_image_brings_is_kept(kind: OrchestratorKind) -> None:
    tuning = {
        "UCX_NET_DEVICES": "mlx5_0:1",
        "KMP_AFFINITY": "none",
        "OMPI_MCA_btl_tcp_if_include": "eth0",
        "HOME": "/r",
    }
    assert tuning.items() <= environ_of(kind, tuning).items()


def test_trap_4_4_mpi_starts_in_containers_where_everyone_is_root_and_cores_are_few() -> None:
    environ = environ_of("mpi", {})
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"):
        assert environ[name] == "1"
    assert environ["OMPI_MCA_coll_ucc_enable"] == "0"
    assert environ["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"


def test_trap_4_4_the_daemon_of_open_mpi_is_found_beside_the_interpreter() -> None:
    folder = str(Path(sys.executable).parent)
    assert environ_of("mpi", {"PATH": "/usr/bin"})["PATH"] == f"{folder}:/usr/bin"
    assert environ_of("mpi", {"PATH": f"/usr/bin:{folder}"})["PATH"] == f"/usr/bin:{folder}"


def test_trap_4_2_ray_never_gets_a_private_cluster_or_bundles_by_variables() -> None:
    left_over = {
        "TLLM_RAY_FORCE_LOCAL_CLUSTER": "1",
        "TRTLLM_RAY_BUNDLE_INDICES": "0,1",
        "TRTLLM_RAY_PER_WORKER_GPUS": "0.5",
    }
    environ = environ_of("ray", left_over)
    assert environ["TLLM_RAY_FORCE_LOCAL_CLUSTER"] == "0"
    assert not {"TRTLLM_RAY_BUNDLE_INDICES", "TRTLLM_RAY_PER_WORKER_GPUS"} & set(environ)


def test_trap_7_6_35_the_group_of_the_replica_is_never_taken_for_the_engines_own() -> None:
    assert "TRTLLM_RAY_BUNDLE_INDICES" not in environ_of("ray", {"TRTLLM_RAY_BUNDLE_INDICES": "0,1,2,3"})


def test_trap_7_6_30_ranks_see_all_gpus_of_their_node() -> None:
    assert environ_of("ray", {})["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
    assert environ_of("ray", {})["TLLM_DISABLE_MPI"] == "1"


def test_trap_4_3_the_empty_mask_of_a_replica_without_gpus_is_removed() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in environ_of("ray", {"CUDA_VISIBLE_DEVICES": ""})
    assert environ_of("ray", {"CUDA_VISIBLE_DEVICES": "2,3"})["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environ_of("mpi", {"CUDA_VISIBLE_DEVICES": "0,1"})["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(("gpus", "value"), [(0, "2"), (1, "2"), (2, None), (8, None), (None, None)])
def test_trap_4_3_the_count_of_gpus_is_passed_over_only_where_the_replica_sees_too_few(
    gpus: int | None, value: str | None
) -> None:
    assert environ_of("ray", {}, TWO_NODES, gpus).get("RAY_LOCAL_WORLD_SIZE") == value


@pytest.mark.parametrize("kind", KINDS)
def test_trap_7_6_32_a_variable_of_ray_train_does_not_change_the_constructors_checks(kind: OrchestratorKind) -> None:
    assert "RAY_LOCAL_WORLD_SIZE" not in environ_of(kind, {"RAY_LOCAL_WORLD_SIZE": "8"}, FOUR, 8)


@given(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from(["PATH", "HOME", "SLURM_JOB_ID", "PMI_RANK", "TLLM_DISABLE_MPI", "CUDA_VISIBLE_DEVICES", "X"]),
        st.sampled_from(["", "1", "/usr/bin"]),
    ),
)
def test_the_changes_made_twice_change_nothing_more(kind: OrchestratorKind, inherited: dict[str, str]) -> None:
    once = environ_of(kind, inherited)
    assert environ_of(kind, once) == once


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [(ONE, 1), (FOUR, 4), (TWO_NODES, 2), (ParallelLayout(tensor=2, pipeline=3, gpus_per_node=5), 4)],
)
def test_each_node_takes_whole_stages(layout: ParallelLayout, ranks: int) -> None:
    assert local_ranks(layout) == ranks
