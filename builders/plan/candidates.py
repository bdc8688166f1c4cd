"""Candidates: which GPU, in which precision, cut into how many ranks. PURE."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from builders.plan.request import Offer, PlannedModel, PlanRequest
from builders.quantize.recipes import min_compute_capability, recipe_mistakes
from builders.settings.quantize import QuantizeSettings, Recipe
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.hardware import Precision
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions, Split

KvCache = Literal["auto", "fp8", "nvfp4"]

_WEIGHTS: dict[Recipe, Precision] = {
    "fp8": "fp8",
    "int8_smoothquant": "int8",
    "int8_weight_only": "int8",
    "int4_awq": "int4",
    "nvfp4": "fp4",
}
# The least lossy first: of two plans that are as good, the one with the earlier recipe is chosen.
RECIPES: tuple[Recipe, ...] = ("none", "fp8", "int8_weight_only", "int8_smoothquant", "nvfp4", "int4_awq")
# FP8 keys and values lose next to nothing where FP8 weights do not; 16-bit ones stay with unquantized weights.
_KV_CACHES: dict[Recipe, tuple[KvCache, ...]] = {
    "fp8": ("fp8", "auto"),
    "nvfp4": ("fp8", "auto"),
    "int4_awq": ("fp8", "auto"),
}
_KV_PRECISION: dict[KvCache, Precision] = {"auto": "bf16", "fp8": "fp8", "nvfp4": "fp4"}
_LARGEST_TENSOR = 16
_PIPELINES = (1, 2, 4, 8)
# A matrix product works on tiles of so many columns; narrower slices of experts are padded.
_TILE = 128


@dataclass(frozen=True)
class Candidate:
    """One way to serve the model.

    Attributes:
        offer: The GPU.
        kind: What is built.
        recipe, kv_cache: As in a build's specification.
        precisions: What they come to, with what the checkpoint is.
        split: How the model is cut into ranks.
    """

    offer: Offer
    kind: BundleKind
    recipe: Recipe
    kv_cache: KvCache
    precisions: Precisions
    split: Split

    @property
    def lossiness(self) -> int:
        """How much the quantization is likely to lose, as a rank."""
        return 2 * RECIPES.index(self.recipe) + (self.kv_cache != "auto")

    @property
    def layout(self) -> str:
        """For tables: TP2 PP2 EP2 DP."""
        split = self.split
        parts = [f"TP{split.tensor}"]
        parts += [f"PP{split.pipeline}"] if split.pipeline > 1 else []
        parts += [f"EP{split.expert}"] if split.experts_apart > 1 else []
        return " ".join([*parts, *(["DP"] if split.attention_dp else [])])


def candidates(request: PlanRequest) -> Iterator[Candidate]:
    """Yield every candidate that the model and the GPUs allow, whether it has room or not."""
    for offer in request.offers:
        for recipe, kv_cache in quantizations(request, offer):
            precisions = _precisions(request.model, recipe, kv_cache)
            for split in splits(request.model.shape, offer, request.kind, request.goal.max_gpus):
                yield Candidate(offer, request.kind, recipe, kv_cache, precisions, split)


def quantizations(request: PlanRequest, offer: Offer) -> list[tuple[Recipe, KvCache]]:
    """Return recipes and KV precisions that the GPU computes with, and that may be used."""
    if request.model.is_quantized:
        return [("none", "auto")]
    allowed = RECIPES if request.recipes is None else request.recipes
    found: list[tuple[Recipe, KvCache]] = []
    for recipe in allowed:
        for kv_cache in _KV_CACHES.get(recipe, ("auto",)):
            settings = QuantizeSettings(recipe=recipe, kv_cache=kv_cache)
            needed = min_compute_capability(settings)
            capability = offer.gpu.compute_capability
            computes = needed is None or (capability != "" and float(capability) >= float(needed))
            if computes and not recipe_mistakes(settings, request.kind):
                found.append((recipe, kv_cache))
    return found


def _precisions(model: PlannedModel, recipe: Recipe, kv_cache: KvCache) -> Precisions:
    if recipe == "none":
        return model.precisions
    return Precisions(weights=_WEIGHTS[recipe], kv_cache=_KV_PRECISION[kv_cache])


def splits(shape: ModelShape, offer: Offer, kind: BundleKind, max_gpus: int | None) -> Iterator[Split]:
    """Yield layouts: tensor ranks where they talk fast and divide the heads, stages across nodes, experts apart."""
    for tensor in tensor_sizes(shape, offer):
        for pipeline in _PIPELINES:
            world = tensor * pipeline
            if pipeline > shape.layers or (max_gpus is not None and world > max_gpus):
                continue
            if kind is BundleKind.TRANSFORMERS_CHECKPOINT and (pipeline > 1 or shape.kv_heads % tensor):
                continue  # that engine has no pipeline, and no copies of key-value heads
            if world > offer.node_gpus and not _fills_nodes(tensor, world, offer.node_gpus):
                continue
            nodes: dict[str, int | bool] = {}
            if world > offer.node_gpus:
                nodes = {"gpus_per_node": offer.node_gpus, "tensor_across_nodes": tensor > offer.node_gpus}
            yield from _expert_splits(shape, kind, tensor, pipeline, nodes)


def tensor_sizes(shape: ModelShape, offer: Offer) -> list[int]:
    """Return how many GPUs can share a layer: of one NVLink domain, or of one node without NVLink."""
    gpu = offer.gpu
    together = gpu.nvlink_gpus if gpu.nvlink_gpus > 1 else offer.node_gpus
    if 1 < gpu.nvlink_gpus < offer.node_gpus:
        together = gpu.nvlink_gpus  # pairs with a bridge
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= min(together, _LARGEST_TENSOR)]
    return [size for size in sizes if shape.divides_over(size)]


def _fills_nodes(tensor: int, world: int, node_gpus: int) -> bool:
    return world % node_gpus == 0 and (node_gpus % tensor == 0 or tensor % node_gpus == 0)


def _expert_splits(
    shape: ModelShape, kind: BundleKind, tensor: int, pipeline: int, nodes: dict[str, int | bool]
) -> Iterator[Split]:
    def split(**more: int | bool | None) -> Split:
        return Split.model_validate({"tensor": tensor, "pipeline": pipeline, **nodes, **more})

    if not shape.experts or tensor == 1 or kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        yield split()
        return
    if shape.intermediate // tensor % _TILE == 0:
        yield split()
    if shape.experts % tensor == 0:
        yield split(expert=tensor)
        if kind is BundleKind.TRTLLM_CHECKPOINT:  # the TensorRT backend has no attention data parallelism
            yield split(expert=tensor, attention_dp=True)
