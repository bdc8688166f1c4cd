"""Compare a built engine with the configuration: TensorRT-LLM clamps or ignores such values, or fails late."""

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.model_directory import BuiltEngine
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import BundleMismatch, ConfigError


def check_built(settings: TrtllmSettings, layout: ParallelLayout, built: BuiltEngine, version: str | None) -> None:
    """Compare with what was fixed at the build.

    Args:
        settings: What is asked for.
        layout: How the engine is cut.
        built: What the engine directory says.
        version: Of the installed TensorRT-LLM; None: not known.

    Raises:
        ConfigError: Something is asked for that cannot be changed after the build.
        BundleMismatch: Another version built the engine.
    """
    if (layout.tensor, layout.pipeline) != (built.tensor, built.pipeline) or built.context != 1:
        raise ConfigError(
            f"parallel: the engine was built for tensor={built.tensor}, pipeline={built.pipeline}, "
            f"context={built.context}, which cannot be changed; configured are tensor={layout.tensor}, "
            f"pipeline={layout.pipeline}; set them so, or build again"
        )
    if version is not None and built.version is not None and built.version != version:
        raise BundleMismatch(
            f"the engine was built by TensorRT-LLM {built.version}, but {version} is installed; an engine runs only "
            "with the version that built it: build again, or install that version"
        )
    fixed = ("dtype", "quantization", "build")
    changed = [name for name in fixed if getattr(settings, name) != type(settings).model_fields[name].get_default()]
    limits = (
        ("max_batch_size", settings.max_batch_size, built.max_batch_size),
        ("max_num_tokens", settings.max_num_tokens, built.max_num_tokens),
        ("context_tokens", settings.context_tokens, built.max_seq_len),
    )
    changed += [f"{name}={asked} (built: {most})" for name, asked, most in limits if asked and most and asked > most]
    # max_seq_len is not even clamped: the build's value is used.
    if settings.context_tokens and built.max_seq_len and settings.context_tokens < built.max_seq_len:
        changed.append(f"context_tokens={settings.context_tokens} (built: {built.max_seq_len})")
    block = built.tokens_per_block
    if block is not None and settings.kv_cache.tokens_per_block != block:
        changed.append(f"kv_cache.tokens_per_block={settings.kv_cache.tokens_per_block} (built: {block})")
    if changed:
        raise ConfigError(
            f"engine: {', '.join(changed)} cannot be changed after the build; remove or adapt, or build again"
        )
