"""From an engine's settings to the engine. The adapters are imported here, late: each needs its own heavy library."""

import json
from itertools import pairwise
from pathlib import Path

from serve.core.parallel import ParallelLayout
from serve.engines.protocol import Engine
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings

AnyEngineSettings = TrtllmSettings | TransformersSettings | SimulatedSettings


def make_engine(
    settings: AnyEngineSettings,
    model_dir: Path,
    layout: ParallelLayout | None = None,
    orchestration: Orchestration | None = None,
) -> Engine:
    """Make the engine that `settings` describes, or of several ranks the first; `start` loads the model.

    Args:
        settings: Which engine, and how.
        model_dir: Its checkpoint on this node.
        layout: How it is cut; None: not at all.
        orchestration: Who starts the ranks of TensorRT-LLM; None: there is one, in this process.

    Raises:
        ConfigError: The engine's library is not installed.
    """
    match settings:
        case TrtllmSettings():
            from serve.engines.trtllm.engine import TrtllmEngine

            return TrtllmEngine(model_dir, settings, layout or ParallelLayout(), orchestration or Orchestration())
        case SimulatedSettings():
            from serve.engines.simulated.engine import SimulatedEngine

            return SimulatedEngine(_fit_to_model(settings, model_dir))
        case TransformersSettings():
            from serve.engines.transformers.engine import TransformersEngine

            return TransformersEngine(model_dir, settings)


def context_limit(settings: AnyEngineSettings) -> int | None:
    """Return how many tokens of prompt and output an engine takes by its settings; None: as many as the model."""
    match settings:
        case TrtllmSettings():
            cache_tokens = settings.kv_cache.max_tokens
            return min((limit for limit in (settings.context_tokens, cache_tokens) if limit is not None), default=None)
        case SimulatedSettings():
            limits = settings.make_limits()
            return min(settings.context_tokens, limits.total_blocks * limits.tokens_per_block)
        case TransformersSettings():
            cache_tokens = settings.kv_cache_tokens
            if cache_tokens is not None:
                cache_tokens -= cache_tokens % settings.tokens_per_block
            return min((limit for limit in (settings.context_tokens, cache_tokens) if limit is not None), default=None)


def _fit_to_model(settings: SimulatedSettings, model_dir: Path) -> SimulatedSettings:
    """Let a simulated engine generate text tokens of the model's tokenizer, unless the settings say which."""
    if settings.model_fields_set & {"vocab_size", "token_range"}:
        return settings
    vocab_size = json.loads((model_dir / "config.json").read_text()).get("vocab_size")
    if not isinstance(vocab_size, int):
        return settings
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    special = sorted(int(token["id"]) for token in tokenizer.get("added_tokens", ()) if token["id"] < vocab_size)
    borders = [-1, *special, vocab_size]
    first, last = max(((a + 1, b - 1) for a, b in pairwise(borders)), key=lambda ids: ids[1] - ids[0])
    return settings.model_copy(update={"vocab_size": vocab_size, "token_range": (first, last)})
