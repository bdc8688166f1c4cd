"""Every setting of a configuration model, with other values than its default: for tests that none is forgotten."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Setting:
    """One setting, and how it is changed.

    Attributes:
        path: Keys from the root; an optional section's variant has its `kind` in `base`.
        base: The sections around it, as a nested dictionary with what they require.
        value: Other than the default.
    """

    path: tuple[str, ...]
    base: dict[str, Any] = field(hash=False)
    value: Any = field(hash=False)

    @property
    def name(self) -> str:
        """Its path as messages have it."""
        return ".".join(self.path)

    def document(self) -> dict[str, Any]:
        """Return the base with this one setting changed."""
        document: dict[str, Any] = _copy(self.base)
        section = document
        for part in self.path[:-1]:
            section = section.setdefault(part, {})
        section[self.path[-1]] = self.value
        return document


# Values that types alone do not tell; what a setting needs beside it is in COMPANIONS.
VALUES: dict[str, list[Any]] = {
    "kv_cache.disk_bytes": [1 << 30],
    "kv_cache.disk_directory": ["/cache"],
    "checkpoint_format": ["mistral", "MX"],
    "pipeline_layers": [[3, 5]],
    "environment": [{"NCCL_DEBUG": "INFO"}],
    "extra": [{"request_stats_max_iterations": 5}, {"kv_cache_config": {"cross_kv_cache_fraction": 0.5}}],
    "model_overrides": [{"num_hidden_layers": 2}],
    "lora.target_modules": [["attn_q"]],
    "lora.preload": [["/adapters/one"]],
    "speculation.layers": [[1, 2]],
    "speculation.model": ["/models/another"],
    "moe.load_balancer": ["/balance.yaml"],
    "build.cache_directory": ["/engines"],
    "build.workspace_directory": ["/scratch"],
    "quantization.algorithm": ["FP8"],
    "cuda_graphs.batch_sizes": [[1, 2, 4]],
}  # fmt: skip
COMPANIONS: dict[str, dict[str, Any]] = {
    "kv_cache.disk_bytes": {"kv_cache": {"disk_directory": "/cache"}},
    "kv_cache.disk_directory": {"kv_cache": {"disk_bytes": 1 << 20}},
}
# What an optional section needs at least; those that are not here need nothing.
REQUIRED: dict[str, dict[str, Any]] = {
    "DraftModelSettings": {"model": "/models/draft"},
    "EagleSettings": {"model": "/models/draft"},
    "Eagle3Settings": {"model": "/models/draft"},
    "LoraSettings": {"target_modules": ["attn_v"]},
    "KvConnectorSettings": {"module": "connector", "scheduler_class": "Scheduler", "worker_class": "Worker"},
    "QuantizationSettings": {"kv_cache_algorithm": "INT8"},
    "AttentionDpSettings": {"enabled": True},
}


def settings_of(model: type[BaseModel]) -> Iterator[Setting]:
    """Yield every setting with every value to try; a section that can be left out is one, too."""
    yield from _walk(model, (), {})


def _walk(model: type[BaseModel], path: tuple[str, ...], base: dict[str, Any]) -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        here = (*path, name)
        sections = list(_sections(info.annotation))
        for section in sections:
            needed = dict(REQUIRED.get(section.__name__, {}))
            kind = section.model_fields.get("kind")
            if kind is not None:
                needed["kind"] = get_args(kind.annotation)[0]
            optional = type(None) in get_args(info.annotation)
            if optional:
                yield Setting(here, base, needed)
            inside = _with(base, here, needed) if needed or optional else base
            if section.__name__ == "AttentionDpSettings":
                yield Setting((*here, "enabled"), base, True)
            yield from _walk(section, here, inside)
        if not sections and name != "kind":
            dotted = ".".join(here)
            start = COMPANIONS.get(dotted, base)
            for value in VALUES.get(dotted) or _other_values(info, base, here):
                yield Setting(here, start, value)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _sections(part)


def _other_values(info: FieldInfo, base: dict[str, Any], path: tuple[str, ...]) -> list[Any]:
    """Return values of the field's type that differ from what it has."""
    now = _look_up(base, path, info.get_default())
    return [value for value in _values(info.annotation, now) if value != now]


def _values(annotation: Any, now: Any) -> list[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if origin in (Union, types.UnionType):
        return [value for part in arguments if part is not type(None) for value in _values(part, now)]
    if origin is Annotated:
        return _values(arguments[0], now)
    if origin is tuple:
        return [[value] for value in _values(arguments[0], None)]
    if annotation is bool:
        return [True, False]
    if annotation is int:
        return [(now or 0) + 7]
    if annotation is float:
        return [(now or 0.0) / 3 + 0.1]
    if annotation is str:
        return [f"another_{now}"]
    raise AssertionError(f"no value of type {annotation} is known: add it to VALUES")


def _with(base: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    document: dict[str, Any] = _copy(base)
    section = document
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = value
    return document


def _look_up(document: Any, path: tuple[str, ...], default: Any) -> Any:
    for part in path:
        if not isinstance(document, dict) or part not in document:
            return default
        document = document[part]
    return document


def _copy(document: Any) -> Any:
    return {key: _copy(value) for key, value in document.items()} if isinstance(document, dict) else document
