"""Which settings a line and a backend of TensorRT-LLM have; what an operator can use instead. One table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serve.engines.trtllm.line import Backend, Line

_BOTH_LINES = frozenset(Line)
_BOTH_BACKENDS = frozenset(Backend)


@dataclass(frozen=True)
class Limit:
    """Where a setting exists.

    Attributes:
        path: Of the setting or section; it is asked for when it differs from its default.
        remedy: What to use instead.
        lines, backends: That have it.
        values: If only some values are limited: whether this one is.
    """

    path: str
    remedy: str
    lines: frozenset[Line] = _BOTH_LINES
    backends: frozenset[Backend] = _BOTH_BACKENDS
    values: Callable[[Any], bool] | None = None


def _pytorch(path: str, remedy: str, values: Callable[[Any], bool] | None = None) -> Limit:
    return Limit(path, remedy, backends=frozenset({Backend.PYTORCH}), values=values)


def _newest(path: str, remedy: str, values: Callable[[Any], bool] | None = None) -> Limit:
    return Limit(path, remedy, lines=frozenset({Line.NEWEST}), values=values)


def _tensorrt(path: str, remedy: str) -> Limit:
    return Limit(path, remedy, lines=frozenset({Line.V1_2}), backends=frozenset({Backend.TENSORRT}))


def _speculation(*kinds: str) -> Callable[[Any], bool]:
    return lambda value: value is not None and value.kind in kinds


_REMOVE = "remove it"
LIMITS = (
    _pytorch("checkpoint_format", "remove it; the TensorRT backend knows the format of its directories"),
    _newest("checkpoint_format", "use HF, or let each node have the checkpoint on a local disk", lambda v: v == "MX"),
    _newest("checkpoint_io", "remove it; 1.2.x reads files in one way"),
    _newest("model_overrides", "change config.json in a copy of the checkpoint"),
    _pytorch("overlap_scheduler", _REMOVE),
    _pytorch("batch_wait", "remove it; scheduler.dynamic_batch tunes the batch there"),
    _newest("kv_cache.disk_bytes", "use kv_cache.host_bytes"),
    _newest("kv_cache.disk_directory", "use kv_cache.host_bytes"),
    _newest("kv_cache.manager", "remove it; 1.2.x has one manager"),
    _newest("kv_cache.dtype", "use fp8 or auto", lambda v: v in ("nvfp4", "fp8_ds_mla")),
    _pytorch("kv_cache.dtype", "set quantization.kv_cache_algorithm, and build the engine with it"),
    Limit(
        "kv_cache.onboard_from_host",
        "remove it, or set kv_cache.host_bytes: 0; the newest line always brings blocks back",
        lines=frozenset({Line.V1_2}),
    ),
    _pytorch("kv_connector", "use kv_cache.host_bytes"),
    _newest("kv_transfer.runtime", "remove it; 1.2.x has one implementation"),
    _newest("scheduler.waiting_order", "use fcfs", lambda v: v == "priority"),
    _tensorrt("scheduler.dynamic_batch", "use batch_wait, or remove it; only the TensorRT backend tunes its limits"),
    _pytorch("cuda_graphs", "remove the section; the TensorRT backend has no such graphs"),
    _pytorch("torch_compile", "remove the section; a TensorRT engine is compiled already"),
    _pytorch("autotuner", "remove it; TensorRT measures kernels when the engine is built"),
    _pytorch("attention_backend", "remove it; the kernels are chosen when the engine is built"),
    _pytorch("allreduce", "remove it; the kernels are chosen when the engine is built"),
    Limit(
        "sampler",
        "remove it; the newest line and the TensorRT backend choose by themselves",
        lines=frozenset({Line.V1_2}),
        backends=frozenset({Backend.PYTORCH}),
    ),
    _pytorch("nvfp4_gemm", "use build.gemm_plugin: nvfp4"),
    _pytorch("min_latency", _REMOVE),
    _pytorch("dynamic_quantization", "use quantization.algorithm"),
    _pytorch("moe", "remove the section; the kernels are chosen when the engine is built"),
    _pytorch("attention_dp", "remove the section, and use parallel.tensor"),
    _pytorch("stream_interval_tokens", "use 1"),
    _pytorch("gc_threshold", _REMOVE),
    _pytorch(
        "speculation", "use kind eagle, or backend: pytorch", _speculation("draft_model", "eagle3", "ngram", "mtp")
    ),
    Limit(
        "speculation",
        "use kind eagle3 with an EAGLE-3 head: the PyTorch backend runs every EAGLE head as EAGLE-3",
        lines=frozenset({Line.V1_2}),
        backends=frozenset({Backend.TENSORRT}),
        values=_speculation("eagle"),
    ),
    _pytorch("guided_decoding", "use xgrammar", lambda v: v == "llguidance"),
    _tensorrt(
        "quantization",
        "quantize the checkpoint with ModelOpt, which writes hf_quant_config.json; kv_cache.dtype alone can be chosen",
    ),
    _tensorrt("build", "remove the section; the PyTorch backend builds no engine"),
    _pytorch("sleep", "stop replicas instead: autoscaling.min_replicas: 0"),
    _pytorch("stats.step_log", _REMOVE),
    _newest("telemetry", "remove it; 1.2.x reports nothing"),
)


def unsupported(settings: BaseModel, line: Line | None, backend: Backend) -> list[str]:
    """Return a message for each setting that is asked for and does not exist.

    Args:
        settings: What is asked for.
        line: None: not known yet; only what no line has is told.
        backend: What runs the model.
    """
    lines = _BOTH_LINES if line is None else frozenset({line})
    where = f"the {backend} backend" if line is None else f"the {backend} backend of TensorRT-LLM {line}"
    messages = []
    for limit in LIMITS:
        if (lines & limit.lines and backend in limit.backends) or not _asked(settings, limit):
            continue
        only_line = line is not None and line not in limit.lines and backend in limit.backends
        who = f"TensorRT-LLM {line}" if only_line else where
        messages.append(f"{limit.path}: {who} does not have this setting{_value(settings, limit)}; {limit.remedy}")
    return messages


def _asked(settings: BaseModel, limit: Limit) -> bool:
    value, default = _look_up(settings, limit.path)
    return value != default and (limit.values is None or limit.values(value))


def _value(settings: BaseModel, limit: Limit) -> str:
    value, _ = _look_up(settings, limit.path)
    if isinstance(value, BaseModel):
        return f" (kind: {value.kind})" if hasattr(value, "kind") else ""
    return f" ({value!r})"


def _look_up(settings: BaseModel, path: str) -> tuple[Any, Any]:
    """Return a setting's value and its default; None and None if its section is not there."""
    value: Any = settings
    default: Any = None
    for part in path.split("."):
        if value is None or part not in type(value).model_fields:
            return None, None
        default = type(value).model_fields[part].get_default()
        value = getattr(value, part)
    return value, default
