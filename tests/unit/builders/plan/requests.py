"""Requests for plans, for tests."""

from typing import Any

from builders.plan.candidates import Candidate, KvCache
from builders.plan.goal import Goal
from builders.plan.request import Offer, PlannedModel, PlanRequest
from builders.settings.quantize import Recipe
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.checkpoint import checkpoint_from_config
from serve.engines.simulated.hardware import GPUS
from serve.engines.simulated.known_models import CONFIGS
from serve.engines.simulated.split import Precisions, Split

CHAT: dict[str, Any] = {"ttft_ms": 200.0, "tpot_ms": 50.0, "input_tokens": 1000, "output_tokens": 200}


def offer(key: str = "h100", price: float | None = None) -> Offer:
    return Offer(key, GPUS[key], price, GPUS[key].node_gpus)


def planned(name: str = "llama-3.1-8b") -> PlannedModel:
    checkpoint = checkpoint_from_config(CONFIGS[name])
    return PlannedModel(name, f"/models/{name}", checkpoint.shape, checkpoint.precisions, checkpoint.is_quantized)


def request(
    model: str = "llama-3.1-8b",
    gpu: str = "h100",
    *,
    kind: BundleKind = BundleKind.TRTLLM_CHECKPOINT,
    recipes: tuple[Recipe, ...] | None = None,
    **goal: Any,
) -> PlanRequest:
    offers = tuple(offer(key) for key in gpu.split(","))
    return PlanRequest(planned(model), Goal(**goal), offers, kind, recipes)


def candidate(
    gpu: str = "h100",
    weights: Any = "fp8",
    kv_cache: Any = "bf16",
    recipe: Recipe = "fp8",
    kv: KvCache = "auto",
    kind: BundleKind = BundleKind.TRTLLM_CHECKPOINT,
    **split: Any,
) -> Candidate:
    precisions = Precisions(weights=weights, kv_cache=kv_cache)
    return Candidate(offer(gpu), kind, recipe, kv, precisions, Split(**split))
