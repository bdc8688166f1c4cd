"""A checkpoint directory -> a model, or a tensor-parallel rank's shard of it, on its device; and the size of its cache.

The one place that decides about devices.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils import logging as library_logging

from serve.engines.transformers.attention import NAME as PAGED
from serve.engines.transformers.attention import paged_attention
from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.quantized import count_weights, has_int8_weights
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.sharding import connect
from serve.engines.transformers.weights import WeightSource, load_weights, plan_shards
from serve.errors import ConfigError

_log = logging.getLogger(__name__)

_TESTED = ((5, 17), (5, 24))
_EAGER = "paged|eager"
_CPU_CACHE_TOKENS = 32_768
_CPU_CACHE_SHARE = 0.25  # of kv_cache_fraction
_DEFAULT_CONTEXT_TOKENS = 2_048
_STEP_TOKENS = {"cpu": 512, "cuda": 4_096}
_SMALL_MODEL_PARAMETERS = 100_000_000
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# While the library makes a model, it replaces functions of PyTorch and of its own for all threads.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to compute.

    Attributes:
        model: The library's model.
        device: Where it is.
        context_tokens: Prompt and output together, at most.
        vocab_size: Number of logits.
        num_blocks: KV blocks that the settings, or the memory, allow.
        is_exact: Whether the settings name that number, so that less will not do.
        max_num_tokens: Tokens of one step, at most.
    """

    model: Any
    device: torch.device
    context_tokens: int
    vocab_size: int
    num_blocks: int
    is_exact: bool
    max_num_tokens: int


def load_model(model_dir: Path, settings: TransformersSettings, group: TensorGroup | None = None) -> LoadedModel:
    """Load a checkpoint; takes seconds to minutes.

    Args:
        model_dir: The checkpoint.
        settings: What the operator chose.
        group: The tensor-parallel group of which this rank loads its shard; its device counts.

    Raises:
        ConfigError: The directory is no checkpoint that the library can load, or the machine lacks what is asked for.
    """
    device = choose_device(settings) if group is None else group.device
    config = _read_config(model_dir)
    text_config = config.get_text_config()
    choices = _attention_choices(settings, text_config, device)
    transformers.AttentionInterface.register(PAGED, paged_attention)
    started_s = time.monotonic()
    if not _TESTED[0] <= _release() < _TESTED[1]:
        _log.warning("transformers %s was not tested with this engine; 5.17 to 5.23 were", transformers.__version__)
    _log.info("loading %s onto %s", model_dir, device)
    with _one_at_a_time, _quiet_library():
        is_int8 = has_int8_weights(model_dir, config)
        if is_int8 and hasattr(config, "quantization_config"):
            del config.quantization_config  # or the library would look for a quantizer of that name
        plan = None if group is None and not is_int8 else plan_shards(config, model_dir, group)
        source = WeightSource(model_dir, config, plan, group, is_int8)
        model = load_weights(source, _choose_dtype(settings, config, device), choices)
        model = model.to(device).eval()
    if group is not None and plan is not None:
        connect(model, plan, group)
        text_config = model.config.get_text_config()  # with the heads of this rank
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what `connect` let go
    if device.type == "cpu":
        _choose_threads(settings, count_weights(model))
    context_tokens = _context_tokens(settings, text_config, model_dir)
    num_blocks, is_exact = _num_blocks(settings, text_config, model.dtype, device, context_tokens)
    _log.info(
        "loaded %.1f million parameters in %.1f s (%s, attention %s); KV cache of %d blocks of %d tokens",
        count_weights(model) / 1e6,
        time.monotonic() - started_s,
        ("int8, computed in " if is_int8 else "") + str(model.dtype).removeprefix("torch."),
        model.config._attn_implementation,
        num_blocks,
        settings.tokens_per_block,
    )
    step_tokens = max(_STEP_TOKENS[device.type], 2 * settings.max_batch_size)
    max_num_tokens = settings.max_num_tokens or step_tokens
    return LoadedModel(model, device, context_tokens, int(text_config.vocab_size), num_blocks, is_exact, max_num_tokens)


def _release() -> tuple[int, int]:
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Without the library's progress bars and hints, which are meant for notebooks."""
    verbosity, bars = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.set_verbosity(verbosity)
        if bars:
            library_logging.enable_progress_bar()


def checkpoint_fingerprint(model_dir: Path) -> str:
    """Return what tells two checkpoints apart, without reading the weights; empty if there is none."""
    found = hashlib.sha256()
    for path in sorted((*model_dir.glob("config.json"), *model_dir.glob("*.safetensors"))):
        content = path.read_bytes() if path.suffix == ".json" else b""
        found.update(f"{path.name} {path.stat().st_size} ".encode() + content)
    return found.hexdigest()[:16]


def choose_device(settings: TransformersSettings, index: int | None = None) -> torch.device:
    """Return where to compute.

    Args:
        settings: What the operator chose.
        index: Of the CUDA device; None for the current one.

    Raises:
        ConfigError: There is no such device.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "engine.device: 'cuda' was asked for, but PyTorch sees no CUDA GPU here (version "
            f"{torch.__version__}); give the replica a GPU and install a CUDA build of PyTorch, or use device: cpu"
        )
    if index is not None and index >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.device: CUDA device {index} was asked for, but this process sees {torch.cuda.device_count()}; "
            "give each tensor rank a GPU of its own"
        )
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _read_config(model_dir: Path) -> Any:
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise ConfigError(f"model: {model_dir} is no directory here; it must have the same path on every node")
    if not path.is_file():
        raise ConfigError(f"model: {path} is missing; give the directory of a Hugging Face checkpoint")
    if not any(any(model_dir.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise ConfigError(f"model: {model_dir} has no weights (*.safetensors); download the whole checkpoint")
    try:
        json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise ConfigError(f"model: {path} cannot be read ({exc}); download the checkpoint again") from exc
    try:
        with _quiet_library():
            return transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except Exception as exc:  # the library raises whatever its parsers raise
        raise ConfigError(
            f"model: {path} describes no model that transformers {transformers.__version__} knows: {exc}"
        ) from exc


def _choose_dtype(settings: TransformersSettings, config: Any, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    if own in (torch.float16, torch.bfloat16):
        return torch.float16 if own is torch.float16 else torch.bfloat16
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _attention_choices(settings: TransformersSettings, text_config: Any, device: torch.device) -> list[str]:
    """Return kinds of attention, in the library's words; the model may lack the first ones."""
    plain = _has_plain_attention(text_config)
    flash = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    installed = [name for name, is_available in flash.items() if device.type == "cuda" and is_available()]
    match settings.attention:
        case "auto":
            return [*installed, PAGED] if plain else [*installed, "sdpa", _EAGER]
        case "paged" if not plain:
            raise ConfigError(
                f"engine.attention: 'paged' computes full attention only, but model type {text_config.model_type} has "
                "sliding windows or capped scores; use auto or sdpa"
            )
        case "flash_attention_2" | "flash_attention_3" if settings.attention not in installed:
            raise ConfigError(
                f"engine.attention: {settings.attention!r} needs a GPU and the flash-attn package; use auto"
            )
        case name:
            return [{"paged": PAGED, "eager": _EAGER}.get(name, name)]


def _choose_threads(settings: TransformersSettings, parameters: int) -> None:
    """Set the threads of each operation, of this thread."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ and parameters < _SMALL_MODEL_PARAMETERS:
        # A step of such a model takes a few milliseconds. Threads that wait for each other cost more than they save,
        # and many times more where replicas share the cores.
        torch.set_num_threads(1)


def _has_plain_attention(text_config: Any) -> bool:
    """Return whether every layer attends to all tokens, without extras that `attention.py` lacks."""
    kinds = getattr(text_config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(text_config, "sliding_window", None) is None
    return full and getattr(text_config, "attn_logit_softcapping", None) is None


def _context_tokens(settings: TransformersSettings, text_config: Any, model_dir: Path) -> int:
    own = getattr(text_config, "max_position_embeddings", None)
    if settings.context_tokens is None:
        return int(own or _DEFAULT_CONTEXT_TOKENS)
    if own is not None and settings.context_tokens > own:
        raise ConfigError(
            f"engine.context_tokens: {settings.context_tokens} exceeds max_position_embeddings={own} of "
            f"{model_dir / 'config.json'}; lower it"
        )
    return settings.context_tokens


def _num_blocks(
    settings: TransformersSettings,
    text_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    context_tokens: int,
) -> tuple[int, bool]:
    """Return the number of KV blocks, and whether the settings name it."""
    if settings.kv_cache_tokens is not None:
        return settings.kv_cache_tokens // settings.tokens_per_block, True
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    token_bytes = 2 * text_config.num_hidden_layers * heads * head_dim * dtype.itemsize
    if settings.kv_cache_bytes is not None:
        blocks = settings.kv_cache_bytes // (token_bytes * settings.tokens_per_block)
        if blocks < 2:
            raise ConfigError(
                f"engine.kv_cache_bytes: {settings.kv_cache_bytes} is less than two blocks of "
                f"{settings.tokens_per_block} tokens, {token_bytes} bytes each; raise it"
            )
        return blocks, True
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        tokens = int(free_bytes * settings.kv_cache_fraction) // token_bytes
    else:
        free_bytes = psutil.virtual_memory().available
        tokens = int(free_bytes * settings.kv_cache_fraction * _CPU_CACHE_SHARE) // token_bytes
        tokens = min(tokens, max(_CPU_CACHE_TOKENS, context_tokens + settings.tokens_per_block))
    return max(2, tokens // settings.tokens_per_block), False
