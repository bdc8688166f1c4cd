"""Sizes of an engine: given, or planned from model, memory and load. PURE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builders.plan.memory import KV_FRACTION, activation_bytes
from builders.plan.sizes import BATCH_SIZES
from builders.settings.compile import CompileSettings
from builders.settings.tune import TuneSettings
from serve.engines.simulated.model_shape import ModelShape
from serve.engines.simulated.split import Precisions, Split
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

# The library's own default: longer prompts come in pieces, and steps do not stutter.
_STEP_TOKENS = 8192
_UNKNOWN_GPU_BATCH = 64
_LARGEST_BATCH = 1024
_RUNTIME_BYTES = 2.2e9  # CUDA, libraries, NCCL: as the planner has it


@dataclass(frozen=True)
class EngineSizes:
    """What bounds an engine.

    Attributes:
        max_batch_size: Sequences that are computed together.
        max_num_tokens: Tokens of one step.
        max_input_tokens: Longest prompt.
        context_tokens: Prompt and output together.
        reasons: Why each is what it is.
    """

    max_batch_size: int
    max_num_tokens: int
    max_input_tokens: int
    context_tokens: int
    reasons: dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where an engine will run.

    Attributes:
        shape: Of the model.
        precisions: Of its weights, keys and values.
        split: How it is cut.
        gpu_memory_bytes: Of each GPU; None: not known.
    """

    shape: ModelShape
    precisions: Precisions
    split: Split
    gpu_memory_bytes: int | None


def plan_sizes(place: Place, compiled: CompileSettings, engine: TrtllmSettings, tune: TuneSettings) -> EngineSizes:
    """Choose the sizes: what `compile` says, else what `engine` says, else what fits.

    Args:
        place: Model and GPU.
        compiled: The build's `compile` section.
        engine: Its `engine` section.
        tune: The load that it is built for.

    Raises:
        ConfigError: They exclude each other, or the model does not fit the GPUs.
    """
    reasons: dict[str, str] = {}
    step = _given(reasons, "max_num_tokens", compiled.max_num_tokens, engine.max_num_tokens)
    if step is None:
        step, reasons["max_num_tokens"] = _STEP_TOKENS, "the library's default; longer prompts come in pieces"
    kv_tokens = _kv_tokens(place, step, engine)
    context = _given(reasons, "context_tokens", compiled.context_tokens, engine.context_tokens)
    if context is None:
        context, reasons["context_tokens"] = _context(place, kv_tokens, engine.kv_cache.tokens_per_block)
    batch = _given(reasons, "max_batch_size", compiled.max_batch_size, engine.max_batch_size)
    if batch is None:
        batch, reasons["max_batch_size"] = _batch(kv_tokens, tune, step)
    longest = compiled.max_input_tokens or engine.build.max_input_tokens
    reasons["max_input_tokens"] = "as given" if longest else "all of the context may be prompt"
    sizes = EngineSizes(batch, step, longest or context, context, reasons)
    _check(sizes, place.shape)
    return sizes


def graph_batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes whose decode steps are recorded as CUDA graphs: few, and none much too large for a batch.

    All of them up to 8, as padding costs most there; then in steps of an eighth, so that no more than that is padding.
    """
    sizes = list(range(1, min(8, largest) + 1))
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8)))
    return tuple(sizes)


def _given(reasons: dict[str, str], name: str, *values: int | None) -> int | None:
    for section, value in zip(("compile", "engine"), values, strict=True):
        if value is not None:
            reasons[name] = f"{section}.{name} says so"
            return value
    return None


def _kv_tokens(place: Place, step_tokens: int, engine: TrtllmSettings) -> int | None:
    """Return how many tokens the KV cache of the whole engine holds; None: the GPU is not known."""
    if place.gpu_memory_bytes is None:
        return engine.kv_cache.max_tokens
    shape, split = place.shape, place.split
    fewest = None
    for stage in range(split.pipeline):
        weights = split.weight_bytes(shape, place.precisions, stage).total
        free = place.gpu_memory_bytes - weights - activation_bytes(shape, split, step_tokens) - _RUNTIME_BYTES
        if free <= 0:
            raise ConfigError(
                f"parallel: the weights of stage {stage} take {weights / 1e9:.1f} GB of each GPU, which has "
                f"{place.gpu_memory_bytes / 1e9:.1f} GB; use more GPUs (tensor, pipeline), or quantize"
            )
        fraction = engine.kv_cache.memory_fraction or KV_FRACTION
        tokens = int(free * fraction / split.kv_bytes_per_token(shape, place.precisions.kv_cache, stage))
        fewest = tokens if fewest is None else min(fewest, tokens)
    limits = [tokens for tokens in (fewest, engine.kv_cache.max_tokens) if tokens is not None]
    return min(limits)


def _context(place: Place, kv_tokens: int | None, block: int) -> tuple[int, str]:
    own = place.shape.context_tokens
    if kv_tokens is None or kv_tokens >= own:
        return own, "the model's own"
    fits = max(block, kv_tokens // block * block)
    return fits, f"the model has {own}, of which the KV cache holds {fits}"


def _batch(kv_tokens: int | None, tune: TuneSettings, step_tokens: int) -> tuple[int, str]:
    largest = min(_LARGEST_BATCH, max(1, step_tokens // 2))
    if kv_tokens is None:
        return min(_UNKNOWN_GPU_BATCH, largest), "no GPU was seen when it was planned; give compile.max_batch_size"
    length = tune.prompt_tokens + tune.output_tokens
    fits = kv_tokens // length
    batch = max(size for size in BATCH_SIZES if size <= max(1, min(fits, largest)))
    return batch, f"the KV cache holds {kv_tokens} tokens, {fits} sequences of {length} as tune has them"


def _check(sizes: EngineSizes, shape: ModelShape) -> None:
    pairs: Sequence[tuple[str, Any, str, Any]] = (
        ("context_tokens", sizes.context_tokens, "the model's max_position_embeddings", shape.context_tokens),
        ("max_input_tokens", sizes.max_input_tokens, "context_tokens", sizes.context_tokens),
        ("max_batch_size", sizes.max_batch_size, "max_num_tokens", sizes.max_num_tokens),
    )
    for name, value, other, most in pairs:
        if value > most:
            raise ConfigError(f"compile.{name}: {value} exceeds {other}, {most}; lower it")
