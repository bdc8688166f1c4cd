"""PlanRequest: everything that a plan is made from. PURE."""

from dataclasses import dataclass, field

from builders.plan.goal import Goal, Objective
from builders.settings.quantize import Recipe
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.hardware import GpuDatasheet
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions


@dataclass(frozen=True)
class PlannedModel:
    """The model.

    Attributes:
        name: For reports, and of the bundle.
        location: Of the checkpoint, as a build's specification has it; None: it is not known.
        shape: Of the decoder.
        precisions: As the checkpoint has its weights.
        is_quantized: Whether the checkpoint is quantized, and cannot be quantized again.
    """

    name: str
    location: str | None
    shape: ModelShape
    precisions: Precisions = field(default_factory=Precisions)
    is_quantized: bool = False


@dataclass(frozen=True)
class Offer:
    """One kind of GPU that may be used.

    Attributes:
        key: Its name in `GPUS`; `cpu` for a machine without one.
        gpu: Its datasheet.
        dollars_per_hour: For one GPU; None: not known.
        node_gpus: GPUs of a node.
    """

    key: str
    gpu: GpuDatasheet
    dollars_per_hour: float | None = None
    node_gpus: int = 8

    @property
    def unit(self) -> str:
        """What one is called."""
        return "CPU core" if self.gpu.generation == "cpu" else "GPU"


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made from.

    Attributes:
        model: The model.
        goal: What the service has to do.
        offers: GPUs that may be used; one or more.
        kind: What is built.
        recipes: Quantizations that may be used; None: all that the GPU computes with.
    """

    model: PlannedModel
    goal: Goal
    offers: tuple[Offer, ...]
    kind: BundleKind = BundleKind.TRTLLM_CHECKPOINT
    recipes: tuple[Recipe, ...] | None = None

    @property
    def objective(self) -> Objective:
        """What decides."""
        if self.goal.objective is not None:
            return self.goal.objective
        if self.goal.rate_per_s is None:
            return Objective.MAX_TOKENS_PER_GPU_HOUR
        priced = len(self.offers) > 1 and all(offer.dollars_per_hour is not None for offer in self.offers)
        return Objective.LOWEST_COST if priced else Objective.FEWEST_GPUS
