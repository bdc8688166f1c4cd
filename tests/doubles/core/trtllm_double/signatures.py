"""Accepted names, types and defaults, from data files: the adapter's signature data and what this folder adds to it."""

import dataclasses
import enum
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import pydantic

from trtllm_double import line

# The product's own signature data is the one truth about constructors; `data/` has methods and request objects.
_CONSTRUCTORS = Path(__file__).resolve().parents[4] / "serve" / "engines" / "trtllm" / "signatures"
_RUNTIME = Path(__file__).resolve().parent / "data"
REQUIRED = "<required>"

Fields = dict[str, dict[str, Any]]


class LoadFormat(enum.Enum):
    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2


class CapacitySchedulerPolicy(enum.StrEnum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(enum.StrEnum):
    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


class WaitingQueuePolicy(enum.StrEnum):
    FCFS = "fcfs"
    PRIORITY = "priority"


class BatchingType(enum.StrEnum):
    STATIC = "STATIC"
    INFLIGHT = "INFLIGHT"


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


constructors: dict[str, Fields] = _load(_CONSTRUCTORS / f"{line.current().name}.json")["classes"]
runtime: dict[str, Any] = _load(_RUNTIME / f"{line.current().name}.json")
QuantAlgo: Any = enum.Enum(  # type: ignore[misc]  # its members are data
    "QuantAlgo", {name: name for name in runtime.get("QuantAlgo", ("FP8", "NVFP4"))}, type=str
)


class _Names(dict[str, Any]):
    """Names in the data's type strings; classes that the double does not have stand for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


names = _Names(
    {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Literal", "Mapping", "Optional", "Sequence")}
)
names.update(Union=typing.Union, Set=typing.Set, Tuple=typing.Tuple, Path=Path, NoneType=None)  # noqa: UP006
names.update(str=str, int=int, float=float, bool=bool, bytes=bytes, object=object, list=list, dict=dict, tuple=tuple)
for _enum in (LoadFormat, CapacitySchedulerPolicy, ContextChunkingPolicy, WaitingQueuePolicy, BatchingType, QuantAlgo):
    names[_enum.__name__] = _enum


def type_of(text: str) -> Any:
    """Return a type that the data names: `Optional[int]`, `KvCacheConfig`."""
    return eval(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text), {"__builtins__": {}}, names)


def default_of(entry: dict[str, Any]) -> Any:
    """Return a default; `REQUIRED` if there is none. Values that are made anew are returned as a callable."""
    value = entry.get("default", REQUIRED)
    if isinstance(value, str) and value.startswith("<factory"):
        made = names.get(value.removeprefix("<factory").strip(" >") or entry["type"]) or names.get(entry["type"])
        return (
            made if made is not None else dict if "Dict" in entry["type"] or "dict" in entry["type"] else lambda: None
        )
    if isinstance(value, str) and value.startswith("LoadFormat."):
        return LoadFormat[value.removeprefix("LoadFormat.")]
    if isinstance(value, list | dict):
        return lambda: type(value)(value)
    return value


class StrictBaseModel(pydantic.BaseModel):
    """Reference 1.2: every nested config refuses unknown fields."""

    model_config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


def make_model(name: str, fields: Fields, base: type[pydantic.BaseModel] = StrictBaseModel) -> Any:
    """Make a pydantic class, and let other classes of the data refer to it by its name."""
    definitions: dict[str, Any] = {}
    for field, entry in fields.items():
        if field.startswith("_"):
            continue
        default = default_of(entry)
        if default == REQUIRED:
            definitions[field] = (type_of(entry["type"]), ...)
        elif callable(default):
            definitions[field] = (type_of(entry["type"]), pydantic.Field(default_factory=default))
        else:
            definitions[field] = (type_of(entry["type"]), default)
    names[name] = pydantic.create_model(name, __base__=base, **definitions)
    return names[name]


def make_dataclass(name: str, fields: Fields, bases: tuple[type, ...] = (), **options: Any) -> Any:
    """Make a dataclass: an unknown keyword is a TypeError."""
    definitions: list[Any] = []
    for field, entry in fields.items():
        default = default_of(entry)
        if default == REQUIRED:
            definitions.append((field, Any))
        elif callable(default) and not isinstance(default, enum.Enum):
            definitions.append((field, Any, dataclasses.field(default_factory=default)))
        else:
            definitions.append((field, Any, dataclasses.field(default=default)))
    names[name] = dataclasses.make_dataclass(name, definitions, bases=bases, **options)
    return names[name]


def signature_of(method: str) -> inspect.Signature:
    """Return the signature of a method of `LLM`, without `self`."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for name, entry in runtime["methods"][method].items():
        default = entry.get("default", REQUIRED)
        parameters.append(
            inspect.Parameter(name, kind, default=inspect.Parameter.empty if default == REQUIRED else default)
        )
    return inspect.Signature(parameters)
