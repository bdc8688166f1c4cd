"""What a step reserves of the cluster. PURE.

Steps that look at the whole model (quantize, compile) are one process on one node, with as many of its GPUs as the
engine has ranks. Reference, tune and verify start an engine: one rank in the step's process; several as a worker group,
in a placement group like that of a replica, whose first bundle has the step's process as a replica's has the replica.
"""

from dataclasses import dataclass

from builders.context import StepName
from builders.spec import BuildSpec
from serve.artifacts.manifest import BundleKind
from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementPlan, Resources, Strategy
from serve.core.resources import ACCELERATOR
from serve.engines.factory import AnyEngineSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.workers.launch import plan_launch
from serve.workers.settings import RankResources

START_ENGINE = frozenset({StepName.REFERENCE, StepName.TUNE, StepName.VERIFY})
_LIGHT = frozenset({StepName.FETCH, StepName.PUBLISH})  # a core, and what memory there is


@dataclass(frozen=True)
class StepResources:
    """What is reserved while a step runs.

    Attributes:
        bundles: Of its placement group, as Ray names resources.
        strategy: How these are spread over nodes.
        process: What the step's own process takes of the first bundle.
        engine_env: Whether that process runs in the target's `engine_env`.
    """

    bundles: tuple[Resources, ...]
    strategy: Strategy
    process: Resources
    engine_env: bool


def step_resources(spec: BuildSpec, step: StepName) -> StepResources:
    """Return what a step reserves.

    Raises:
        PlacementError, ConfigError: The engine's ranks cannot be started as the specification has it.
    """
    in_env = spec.target.engine_env is not None and uses_trtllm(spec, step)
    if step in START_ENGINE:
        plan = engine_plan(spec, step)
        return StepResources(plan.bundles, plan.strategy, plan.replica, in_env)
    light = step in _LIGHT
    whole = RankResources(
        num_cpus=min(1.0, spec.target.num_cpus) if light else spec.target.num_cpus,
        num_gpus=0.0 if light or not _takes_gpus(spec, step) else float(_gpus_of_one_node(spec)),
        memory_bytes=None if light else spec.target.memory_bytes,
        accelerator_type=spec.target.accelerator,
    ).of_rank(default_gpus=0.0)
    return StepResources((whole,), "STRICT_PACK", whole, in_env)


def uses_trtllm(spec: BuildSpec, step: StepName) -> bool:
    """Whether a step's process loads TensorRT-LLM, or has to know its version."""
    if spec.kind.engine != "trtllm":
        return False
    if step is StepName.REFERENCE:
        return spec.verify.reference_engine != "transformers"
    return step in (StepName.COMPILE, StepName.TUNE, StepName.VERIFY, StepName.PUBLISH)


def engine_plan(spec: BuildSpec, step: StepName) -> PlacementPlan:
    """Return how the ranks of the engine that a step starts are started and placed.

    The step's process runs in bundle 0 of a placement group of this plan, and in the engine's environment already.

    Raises:
        PlacementError, ConfigError: They cannot be, as the specification has it.
    """
    settings = engine_settings(spec, step)
    # Nobody has asked a node whether MPI can start processes: `auto` takes Ray, which works anywhere.
    return plan_launch(settings, _layout(spec, step), _rank_resources(spec, step), mpi_works=lambda: None)


def engine_settings(spec: BuildSpec, step: StepName) -> AnyEngineSettings:
    """Return the settings that the engine of a step starts from, with the backend that loads what the step gives it."""
    if step is StepName.REFERENCE and spec.kind.engine == "trtllm" and not uses_trtllm(spec, step):
        return TransformersSettings(device=spec.verify.reference_device)
    settings = spec.engine_settings()
    if not isinstance(settings, TrtllmSettings) or settings.backend != "auto":
        return settings
    compiled = spec.kind is BundleKind.TENSORRT_ENGINE and step is not StepName.REFERENCE
    return settings.model_copy(update={"backend": "tensorrt" if compiled else "pytorch"})


def without_labels(resources: Resources) -> Resources:
    """Return the amounts that people know, without the marks of a node's kind of GPU."""
    return {name: amount for name, amount in resources.items() if not name.startswith(ACCELERATOR)}


def _rank_resources(spec: BuildSpec, step: StepName) -> RankResources:
    target, ranks = spec.target, spec.parallel.world_size
    return RankResources(
        # TensorRT-LLM's Ray workers take a whole core each.
        num_cpus=max(1.0, target.num_cpus / ranks) if target.num_cpus >= 1 else target.num_cpus / ranks,
        num_gpus=1.0 if _takes_gpus(spec, step) else 0.0,
        memory_bytes=None if target.memory_bytes is None else -(-target.memory_bytes // ranks),
        accelerator_type=target.accelerator,
        replica_cpus=min(0.5, target.num_cpus),
    )


def _layout(spec: BuildSpec, step: StepName) -> ParallelLayout:
    """Return how the engine of a step is cut: transformers, in the place of TensorRT-LLM, cuts layers only."""
    if spec.kind.engine == "transformers" or uses_trtllm(spec, step):
        return spec.parallel
    return ParallelLayout(tensor=spec.parallel.world_size) if _takes_gpus(spec, step) else ParallelLayout()


def _takes_gpus(spec: BuildSpec, step: StepName) -> bool:
    if spec.target.accelerator is None:
        return False
    if step is StepName.QUANTIZE:
        return spec.quantize.device != "cpu"
    return step is not StepName.REFERENCE or uses_trtllm(spec, step) or spec.verify.reference_device != "cpu"


def _gpus_of_one_node(spec: BuildSpec) -> int:
    layout = spec.parallel
    return min(layout.world_size, layout.gpus_per_node or layout.world_size)
