"""Orchestration: who starts the ranks of a TensorRT-LLM engine, as the adapter needs to know it. No Ray here."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from serve.core.parallel import ParallelLayout
from serve.core.placement import plan_placement
from serve.errors import ConfigError

OrchestratorKind = Literal["in_process", "mpi", "ray"]

# What a launcher (mpirun, srun, a Slurm step around `ray start`) leaves in the environment of all that it starts: MPI
# would believe to be one of its ranks. UCX_ and KMP_ are tuning, not marks of a launch, and stay.
LAUNCH_PREFIXES = ("MPI_", "OMPI_", "PRTE_", "PMIX_", "PMI_", "SLURM_", "I_MPI_", "HYDRA_", "MPICH_", "MV2_", "CRAY_")
_LAUNCH_NAMES = ("tllm_mpi_size",)
# Images tune Open MPI by OMPI_MCA_<framework>_...; these frameworks are the runtime's own, set by a launcher only.
_TUNING_PREFIX = "OMPI_MCA_"
_LAUNCHED_FRAMEWORKS = ("ess", "orte", "prte", "pmix", "plm", "ras", "rmaps", "odls", "initial_wdir")
# For Open MPI 4 and 5, whose daemon is PRRTE. Containers run as root; GPUs, not cores, limit the ranks of a node, and a
# rank is more than one busy thread, so that it must not be bound to one core. A rank that dies must not take this
# process with it, as Open MPI 5 has it (measured with 5.0.11: exit status 14): the streams are to end in order.
# Not MPI4PY_MPIABI, which others set: with it, mpi4py does not look where the wheels of Open MPI have the library.
_OPEN_MPI = {
    "OMPI_MCA_coll_ucc_enable": "0",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "PRTE_MCA_state_base_recoverable": "1",
}
# Each of these, left over from another engine or launcher, changes which executor TensorRT-LLM makes, or where.
OTHER_MODES = (
    "TLLM_DISABLE_MPI",
    "TLLM_WORKER_USE_SINGLE_PROCESS",
    "TLLM_RAY_FORCE_LOCAL_CLUSTER",
    "TLLM_SPAWN_PROXY_PROCESS",
    "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR",
    "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY",
    "TRTLLM_RAY_BUNDLE_INDICES",
    "TRTLLM_RAY_PER_WORKER_GPUS",
    "RAY_LOCAL_WORLD_SIZE",
)
DECIDED_HERE = frozenset({*OTHER_MODES, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"})


@dataclass(frozen=True)
class Orchestration:
    """Who starts the ranks.

    Attributes:
        kind: in_process: one rank, a thread of this process; mpi: TensorRT-LLM spawns one process a rank on this node;
            ray: one Ray actor a rank, in the bundles named below.
        placement_groups: Ray placement groups, opaque here; empty unless `kind` is ray.
        bundle_indices: For each group, the bundle of each of its ranks, in rank order.
        environ: Variables that have to be set before TensorRT-LLM is imported; None removes one.
    """

    kind: OrchestratorKind = "in_process"
    placement_groups: tuple[Any, ...] = ()
    bundle_indices: tuple[tuple[int, ...], ...] = ()
    environ: Mapping[str, str | None] = field(default_factory=dict)


def choose_orchestrator(
    asked: Literal["auto", "in_process", "mpi", "ray"], layout: ParallelLayout, mpi_spawns: bool, tensorrt: bool = False
) -> OrchestratorKind:
    """Decide who starts the ranks.

    Args:
        asked: The setting.
        layout: How the engine is cut.
        mpi_spawns: Whether `MPI_Comm_spawn` works where the engine will run; only asked for on one node.
        tensorrt: The TensorRT backend runs the model, which Ray cannot start.

    Raises:
        ConfigError: What is asked for cannot start these ranks.
    """
    several_nodes = layout.gpus_per_node is not None and layout.gpus_per_node < layout.world_size
    if asked == "auto":
        if layout.world_size == 1:
            return "in_process"
        asked = "mpi" if tensorrt or (mpi_spawns and not several_nodes) else "ray"
    if asked == "in_process" and layout.world_size > 1:
        raise ConfigError(
            f"orchestrator: in_process starts one rank, but parallel has {layout.world_size}; use mpi, ray or auto"
        )
    if asked == "mpi" and several_nodes:
        raise ConfigError(
            f"orchestrator: mpi starts ranks on one node only, but parallel takes {layout.gpus_per_node} GPUs of each "
            f"node for {layout.world_size} ranks; use ray" + (", with the PyTorch backend" if tensorrt else "")
        )
    if asked == "mpi" and layout.world_size > 1 and not mpi_spawns:
        raise ConfigError(
            "orchestrator: mpi needs an MPI whose MPI_Comm_spawn works, and that of this node does not; use ray, or "
            "another image (Open MPI 5.0.10rc2 of nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc27 cannot, for instance)"
        )
    if asked == "ray" and tensorrt:
        raise ConfigError("orchestrator: ray runs the PyTorch backend only; use mpi, or backend: pytorch")
    return asked


def engine_environ(
    kind: OrchestratorKind,
    layout: ParallelLayout,
    inherited: Mapping[str, str],
    visible_gpus: int | None = None,
) -> dict[str, str | None]:
    """Return what has to be changed in the environment of the process that will import TensorRT-LLM.

    Args:
        kind: Who starts the ranks.
        layout: How the engine is cut.
        inherited: The environment as it is.
        visible_gpus: GPUs that the process can see once the changes are made; None: not known.

    Returns:
        Variables to set; None removes one.
    """
    changes: dict[str, str | None] = {name: None for name in inherited if _is_mark_of_a_launch(name)}
    changes |= {name: None for name in OTHER_MODES if name in inherited}
    if kind == "ray":
        # Ray sets no GPU mask for ranks with NOSET, so that NVLink works; the mask of a zero-GPU replica is copied to
        # all ranks, and the arguments themselves are checked against a visible GPU.
        changes |= {"TLLM_DISABLE_MPI": "1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        changes["TLLM_RAY_FORCE_LOCAL_CLUSTER"] = "0"
        if inherited.get("CUDA_VISIBLE_DEVICES") == "":
            changes["CUDA_VISIBLE_DEVICES"] = None
        needed = local_ranks(layout)
        if needed > (needed if visible_gpus is None else visible_gpus):
            # The way past "Only N GPUs are available": the constructor counts the GPUs of the replica's own process.
            changes["RAY_LOCAL_WORLD_SIZE"] = str(needed)
        return changes
    changes |= _OPEN_MPI
    folder = str(Path(sys.executable).parent)
    if folder not in (path := inherited.get("PATH", folder)).split(os.pathsep):
        # Open MPI's daemon is started by name; a virtual environment need not be active for its Python to run.
        changes["PATH"] = f"{folder}{os.pathsep}{path}"
    if kind == "in_process":
        changes["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
    return changes


def local_ranks(layout: ParallelLayout) -> int:
    """Return how many ranks each node takes, the replica's own among them: TensorRT-LLM's `gpus_per_node`."""
    # Whole stages where one fits on a node; what CPUs and GPUs are asked for makes no difference.
    return plan_placement(layout, "ray", replica={"CPU": 1}, rank={"GPU": 1}).ranks_per_node


def _is_mark_of_a_launch(name: str) -> bool:
    if name in _LAUNCH_NAMES:
        return True
    if name.startswith(_TUNING_PREFIX):
        return name.removeprefix(_TUNING_PREFIX).startswith(_LAUNCHED_FRAMEWORKS)
    return name.startswith(LAUNCH_PREFIXES)
