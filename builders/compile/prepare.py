"""What is prepared for the PyTorch backend, which compiles nothing ahead: the settings that it starts with. PURE."""

from typing import Any

from builders.compile.sizes import EngineSizes, graph_batch_sizes
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

_KV_DTYPES = {"FP8": "fp8", "NVFP4": "nvfp4"}


def prepared_section(settings: TrtllmSettings, sizes: EngineSizes, kv_algorithm: str | None) -> dict[str, Any]:
    """Return the engine's section of runtime.json, to start tuning from.

    Args:
        settings: The build's `engine` section.
        sizes: That bound it.
        kv_algorithm: `kv_cache_quant_algo` of the checkpoint; None: 16 bits.

    Raises:
        ConfigError: The settings contradict the checkpoint.
    """
    graphs = settings.cuda_graphs
    section: dict[str, Any] = {
        "kind": "trtllm",
        "backend": "pytorch",
        "max_batch_size": sizes.max_batch_size,
        "max_num_tokens": sizes.max_num_tokens,
        "context_tokens": sizes.context_tokens,
    }
    if graphs.enabled:
        largest = min(sizes.max_batch_size, graphs.max_batch_size or sizes.max_batch_size)
        chosen = sorted(set(graphs.batch_sizes)) or list(graph_batch_sizes(largest))
        section["cuda_graphs"] = {"batch_sizes": chosen, "max_batch_size": None, "padding": graphs.padding}
    if kv_algorithm is not None:
        section["kv_cache"] = {"dtype": _kv_dtype(settings, kv_algorithm)}
    return section


def _kv_dtype(settings: TrtllmSettings, kv_algorithm: str) -> str:
    dtype = _KV_DTYPES.get(kv_algorithm)
    if dtype is None:
        raise ConfigError(
            f"quantize.kv_cache: the checkpoint has {kv_algorithm}, which the PyTorch backend does not load"
        )
    asked = settings.kv_cache.dtype
    if asked not in ("auto", dtype):
        raise ConfigError(
            f"engine.kv_cache.dtype: {asked!r} is asked for, but the checkpoint's scales are for {dtype!r}; remove it"
        )
    return dtype
