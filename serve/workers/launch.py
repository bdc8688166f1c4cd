"""Which launcher starts an engine, and what its ranks take: decided from the configuration alone, before Ray."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from serve.artifacts.bundle_source import BundleSource
from serve.core.parallel import ParallelLayout
from serve.core.placement import LauncherKind, PlacementPlan, plan_placement
from serve.engines.factory import AnyEngineSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.line import Backend
from serve.engines.trtllm.model_directory import DirectoryKind, read_model_directory
from serve.engines.trtllm.orchestration import choose_orchestrator
from serve.engines.trtllm.settings import TrtllmSettings
from serve.workers.bundle_settings import BundleSettings
from serve.workers.engine_env import EngineEnv
from serve.workers.group_settings import GroupSettings
from serve.workers.settings import RankResources

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLaunch:
    """All that a replica has to know to start one engine.

    Attributes:
        engine: Which engine, and its settings.
        model_dir: Its checkpoint, at the same path on every node; of a bundle: not known before it was downloaded.
        plan: Who starts the ranks, and what was reserved for them.
        env: The engine's Python environment, if it is not the replica's.
        watch: How the ranks are watched.
        bundle: What is downloaded first; None: the checkpoint is there.
    """

    engine: AnyEngineSettings
    model_dir: str
    plan: PlacementPlan
    env: EngineEnv | None
    watch: GroupSettings
    bundle: BundleSource | None = None

    @property
    def certified(self) -> BundleSource | None:
        """The bundle, if this is the engine that it was made and verified for; a fallback only borrows its files."""
        return self.bundle if self.bundle and self.bundle.manifest.kind.engine == self.engine.kind else None

    @property
    def stains(self) -> bool:
        """Whether the engine lives in its replica's process: if it fails, its traces stay in there."""
        return self.plan.launcher in ("in_process", "mpi") and self.plan.host_bundle is None and self.env is None


@dataclass(frozen=True)
class LaunchChain:
    """What a replica tries, one after the other; all of it fits into what it reserves.

    Attributes:
        launches: The first is what was configured; an earlier bundle and the fallback follow, as far as there are.
        max_failures: How often a launch is tried before the next one.
        bundle_check: How bundles are taken into use.
    """

    launches: tuple[EngineLaunch, ...]
    max_failures: int
    bundle_check: BundleSettings


def check_launch(engine: AnyEngineSettings, layout: ParallelLayout, resources: RankResources) -> None:
    """Check that there is a way to start such an engine, wherever it may be.

    Raises:
        ValueError, ConfigError: There is none; names the setting and the remedy.
    """
    if isinstance(engine, TransformersSettings) and layout.pipeline > 1:
        raise ValueError(
            f"parallel.pipeline={layout.pipeline}: the transformers engine has tensor parallelism only; use tensor, or "
            "engine: trtllm"
        )
    if not isinstance(engine, TrtllmSettings) and layout.expert is not None:
        raise ValueError(
            f"parallel.expert={layout.expert}: the {engine.kind} engine has no expert parallelism; remove it, or use "
            "engine: trtllm"
        )
    gpus = resources.num_gpus
    if layout.world_size > 1 and gpus is not None and gpus not in (0, 1):
        raise ValueError(f"resources.num_gpus={gpus:g} is what each of {layout.world_size} ranks takes; use 1, or 0")
    if gpus is not None and gpus > 1:
        raise ValueError(
            f"resources.num_gpus={gpus:g}: a rank takes one GPU, or a share of one; to use {gpus:g} GPUs, set "
            f"parallel.tensor: {gpus:g}"
        )
    plan = plan_launch(engine, layout, resources, mpi_works=lambda: True)
    if plan.launcher == "ray" and resources.num_cpus < 1:
        raise ValueError(
            f"resources.num_cpus={resources.num_cpus:g}: each of TensorRT-LLM's Ray workers takes a whole CPU core of "
            "its bundle; use 1 or more"
        )


def check_fallback(engine: AnyEngineSettings, layout: ParallelLayout) -> None:
    """Check that the transformers engine could take over from `engine`.

    Raises:
        ValueError: It could not; names the setting and the remedy.
    """
    if isinstance(engine, TransformersSettings):
        raise ValueError("fallback: the engine is `transformers` already; remove `fallback`")
    if layout.gpus_per_node is not None and layout.gpus_per_node < layout.world_size:
        raise ValueError(
            f"fallback: the transformers engine runs on one node, and gpus_per_node={layout.gpus_per_node} spreads "
            f"{layout.world_size} ranks over several; remove `fallback`, or raise gpus_per_node"
        )


def plan_launch(
    engine: AnyEngineSettings,
    layout: ParallelLayout,
    resources: RankResources,
    *,
    mpi_works: Callable[[], bool | None],
    model_dir: Path | None = None,
    own_process: bool = False,
) -> PlacementPlan:
    """Decide who starts the ranks, and what a replica reserves for them.

    Args:
        engine: Which engine.
        layout: How it is cut into ranks.
        resources: What one rank takes.
        mpi_works: Asked only if the answer matters: whether MPI can start processes where the engine will run;
            None: not known yet. Then `orchestrator: mpi` is believed, and `auto` takes ray.
        model_dir: Its checkpoint; None: not looked at, so that any orchestrator is believed to be able to start it.
        own_process: The engine is not to live in its replica's process.

    Raises:
        PlacementError, ConfigError: The orchestrator that was asked for cannot start such a layout.
    """
    return plan_placement(
        layout,
        _launcher(engine, layout, mpi_works, model_dir),
        replica=resources.of_replica(),
        rank=resources.of_rank(default_gpus=1.0 if isinstance(engine, TrtllmSettings) else 0.0),
        own_environment=own_process,
    )


def fallback_launch(launch: EngineLaunch, engine: TransformersSettings, model_dir: Path | None = None) -> EngineLaunch:
    """Return how the transformers engine takes over what was reserved for another engine: one actor a GPU.

    Args:
        launch: Of the other engine, which does not live in the replica's process.
        engine: Settings of the fallback.
        model_dir: A checkpoint that it can load; None: the other engine's.
    """
    plan, world_size = launch.plan, launch.plan.layout.world_size
    rank = plan.rank
    if plan.host_bundle is not None:
        rank = {
            name: amount if name.startswith("accelerator_type:") else amount / world_size
            for name, amount in plan.bundles[plan.host_bundle].items()
        }
    plan = replace(
        plan, launcher="torch_distributed", layout=ParallelLayout(tensor=world_size), rank=rank, host_bundle=None
    )
    if model_dir is not None:
        launch = replace(launch, model_dir=str(model_dir), bundle=None)
    return replace(launch, engine=engine, plan=plan, env=None)


def _launcher(
    engine: AnyEngineSettings, layout: ParallelLayout, mpi_works: Callable[[], bool | None], model_dir: Path | None
) -> LauncherKind:
    if not isinstance(engine, TrtllmSettings):
        return "in_process" if layout.world_size == 1 else "torch_distributed"
    tensorrt = engine.backend == Backend.TENSORRT.value
    if engine.backend == "auto" and model_dir is not None:
        tensorrt = read_model_directory(model_dir).kind is not DirectoryKind.HUGGING_FACE
    one_node = layout.gpus_per_node is None or layout.gpus_per_node >= layout.world_size
    matters = layout.world_size > 1 and one_node and engine.orchestrator in ("auto", "mpi") and not tensorrt
    return choose_orchestrator(
        engine.orchestrator, layout, _mpi_spawns(engine, mpi_works) if matters else True, tensorrt
    )


def _mpi_spawns(engine: TrtllmSettings, mpi_works: Callable[[], bool | None]) -> bool:
    answer = mpi_works()
    if answer is not None:
        return answer
    if engine.orchestrator == "mpi":
        return True  # the replica finds out
    logger.info(
        "orchestrator: auto takes ray, which works anywhere: it is not known whether MPI can start processes, as no "
        "GPU node answered yet. Set orchestrator: mpi to have it in any case."
    )
    return False
