"""Recipes: what each does to a model, who can load the result, and on which GPUs. PURE, one table.

Who can load it, sources: the linear layers of TensorRT-LLM's PyTorch backend (`get_quant_method`, 1.2 and main; it has
no SmoothQuant); the checkpoint loader of the TensorRT backend of 1.2.x (`ModelLoader._load_model_from_hf`), which
reads scales of FP8 and NVFP4 from a unified checkpoint, and those of SmoothQuant and AWQ from its own format only.
"""

from dataclasses import dataclass
from typing import Literal

from builders.settings.quantize import QuantizeSettings, Recipe
from serve.artifacts.manifest import BundleKind

Format = Literal["unified", "tensorrt-llm"]

_TRTLLM = frozenset({BundleKind.TRTLLM_CHECKPOINT, BundleKind.TENSORRT_ENGINE})
_ENGINE = frozenset({BundleKind.TENSORRT_ENGINE})
_TRANSFORMERS = frozenset({BundleKind.TRANSFORMERS_CHECKPOINT})


@dataclass(frozen=True)
class RecipeFacts:
    """One recipe.

    Attributes:
        algorithm: `quant_algo` of hf_quant_config.json.
        config: Name of ModelOpt's preset; None: it is made without ModelOpt.
        kinds: Bundles that may hold the result.
        weight_bits: Of each quantized weight, with its share of the scales.
        calibrated: Whether texts are needed.
        min_compute_capability: Of the GPUs that compute with it; None: any, and CPUs.
        instead: What to use where it cannot be loaded.
    """

    algorithm: str
    config: str | None
    kinds: frozenset[BundleKind]
    weight_bits: float
    calibrated: bool
    min_compute_capability: str | None
    instead: str


_RECIPES: dict[Recipe, RecipeFacts] = {
    "int8_weight_only": RecipeFacts("W8A16", None, _TRANSFORMERS, 8, False, None, "fp8, int4_awq or none"),
    "fp8": RecipeFacts("FP8", "FP8_DEFAULT_CFG", _TRTLLM, 8, True, "8.9", "int8_weight_only or none"),
    "int8_smoothquant": RecipeFacts(
        "W8A8_SQ_PER_CHANNEL", "INT8_SMOOTHQUANT_CFG", _ENGINE, 8, True, "8.0",
        "fp8 or int4_awq, or kind: tensorrt-engine (the PyTorch backend has no kernels for it)",
    ),
    "int4_awq": RecipeFacts("W4A16_AWQ", "INT4_AWQ_CFG", _TRTLLM, 4.25, True, "8.0", "int8_weight_only or none"),
    "nvfp4": RecipeFacts("NVFP4", "NVFP4_DEFAULT_CFG", _TRTLLM, 4.5, True, "10.0", "int8_weight_only or none"),
}  # fmt: skip
_KV_PRESETS = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
_KV_CAPABILITY = {"fp8": "8.9", "nvfp4": "10.0"}
# Groups of the kernels for 4-bit weights, in both backends.
_GROUP_SIZES = (64, 128)


def recipe_facts(settings: QuantizeSettings) -> RecipeFacts | None:
    """Return what a recipe does; None: nothing is quantized."""
    return _RECIPES.get(settings.recipe)


def export_format(settings: QuantizeSettings, kind: BundleKind) -> Format:
    """Return how the result is written: as the unified checkpoint, or as the TensorRT backend's own."""
    own = kind is BundleKind.TENSORRT_ENGINE and settings.recipe in ("int8_smoothquant", "int4_awq")
    return "tensorrt-llm" if own else "unified"


def presets(settings: QuantizeSettings) -> tuple[str, ...]:
    """Return the names of ModelOpt's presets that make up a recipe, weights first."""
    facts = recipe_facts(settings)
    kv = _KV_PRESETS.get(settings.kv_cache)
    return tuple(name for name in (facts and facts.config, kv) if name)


def min_compute_capability(settings: QuantizeSettings) -> str | None:
    """Return the oldest GPUs that can compute with what a recipe makes; None: any."""
    facts = recipe_facts(settings)
    needed = [facts and facts.min_compute_capability, _KV_CAPABILITY.get(settings.kv_cache)]
    return max((value for value in needed if value), key=float, default=None)


def recipe_mistakes(settings: QuantizeSettings, kind: BundleKind) -> tuple[str, ...]:
    """Return what keeps a recipe from making a bundle of a kind; each names key, value and remedy."""
    mistakes = []
    facts = recipe_facts(settings)
    if facts is not None and kind not in facts.kinds:
        mistakes.append(
            f"quantize.recipe: {settings.recipe!r} cannot be loaded from a {kind.value}; use {facts.instead}"
        )
    if settings.kv_cache != "auto":
        mistakes += _kv_mistakes(settings, kind)
    if settings.recipe == "int4_awq" and settings.group_size not in _GROUP_SIZES:
        mistakes.append(
            f"quantize.group_size: {settings.group_size} has no kernels; use {' or '.join(map(str, _GROUP_SIZES))}"
        )
    return tuple(mistakes)


def _kv_mistakes(settings: QuantizeSettings, kind: BundleKind) -> list[str]:
    key = f"quantize.kv_cache: {settings.kv_cache!r}"
    if kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        return [f"{key} needs TensorRT-LLM; the transformers engine keeps keys and values in 16 or 32 bits: use auto"]
    if settings.recipe == "none":
        # Its loader refuses a hf_quant_config.json without quant_algo.
        return [f"{key} needs a recipe for the weights, too; for the KV cache alone set engine.kv_cache.dtype instead"]
    if settings.kv_cache == "nvfp4" and kind is BundleKind.TENSORRT_ENGINE:
        return [f"{key} is the PyTorch backend's alone; use fp8, or kind: trtllm-checkpoint"]
    return []
