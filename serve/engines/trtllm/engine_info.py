"""PURE: what is fixed once an engine runs, from the model's config.json, the settings and what the library told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.engines.protocol import EngineInfo
from serve.engines.trtllm.arguments import EnginePlan
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

_DEFAULT_BATCH = 2048  # of both lines, when none is given


@dataclass(frozen=True)
class Limits:
    """Sizes that requests have to fit.

    Attributes:
        context_tokens: Prompt and output of one sequence.
        vocab_size: Token ids are below this.
        tokens_per_block: Size of a KV block.
        max_batch_size: Sequences computed together.
        step_tokens: Longest prompt, where prompts are not cut into chunks; None: no limit of its own.
    """

    context_tokens: int
    vocab_size: int
    tokens_per_block: int
    max_batch_size: int
    step_tokens: int | None


def engine_limits(plan: EnginePlan, settings: TrtllmSettings, config: Mapping[str, Any]) -> Limits:
    """Find out the sizes.

    Args:
        plan: What will be loaded.
        settings: Of the engine.
        config: Content of the model directory's config.json.

    Raises:
        ConfigError: config.json does not tell the vocabulary or the context.
    """
    built = plan.model.built
    inner = config.get("pretrained_config", config)
    parts = [inner, *(part for name in ("text_config", "llm_config") if isinstance(part := inner.get(name), Mapping))]
    vocab_size = _first(parts, ("vocab_size",))
    contexts = [settings.context_tokens, built.max_seq_len if built else None]
    if contexts == [None, None]:
        contexts = [_first(parts, ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions"))]
    known = [tokens for tokens in contexts if tokens]
    if not vocab_size or not known:
        missing = "vocab_size" if not vocab_size else "max_position_embeddings; set engine.context_tokens"
        raise ConfigError(f"model: {plan.model.path / 'config.json'} does not tell {missing}")
    step_tokens = settings.max_num_tokens or (built.max_num_tokens if built else None) or 8192
    return Limits(
        context_tokens=min(known),
        vocab_size=vocab_size,
        tokens_per_block=(built.tokens_per_block if built else None) or settings.kv_cache.tokens_per_block,
        max_batch_size=settings.max_batch_size or (built.max_batch_size if built else None) or _DEFAULT_BATCH,
        step_tokens=None if settings.chunked_prefill else step_tokens,
    )


def engine_info(version: str, plan: EnginePlan, limits: Limits, total_blocks: int) -> EngineInfo:
    """Put together what an engine says of itself."""
    return EngineInfo(
        engine=f"tensorrt-llm {version} ({plan.backend})",
        context_tokens=limits.context_tokens,
        vocab_size=limits.vocab_size,
        tokens_per_block=limits.tokens_per_block,
        total_blocks=total_blocks,
        device="cuda",
    )


def check_capacity(settings: TrtllmSettings, limits: Limits, total_blocks: int) -> str | None:
    """Compare the KV cache with what is needed.

    A GPU whose memory another process still holds gives a tiny KV cache, and no error.

    Returns:
        A warning; None if all is well.

    Raises:
        ConfigError: Fewer tokens fit than `kv_cache.min_tokens`.
    """
    tokens = total_blocks * limits.tokens_per_block
    wanted = settings.kv_cache.min_tokens
    if wanted is not None and tokens < wanted:
        raise ConfigError(
            f"engine.kv_cache.min_tokens: {wanted} are asked for, but the KV cache holds {tokens} tokens; another "
            "process may hold the GPU's memory, or the model leaves too little: lower min_tokens or free the GPU"
        )
    if tokens < limits.context_tokens:
        return (
            f"The KV cache holds {tokens} tokens, less than one sequence of the context, {limits.context_tokens}: "
            "longer ones are refused. Another process may hold the GPU's memory."
        )
    return None


def _first(parts: list[Mapping[str, Any]], names: tuple[str, ...]) -> int | None:
    for part in parts:
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
