"""PURE: the knobs of an engine, their values in order of the memory they take, and the settings of a point.

What the specification's `engine` section names stays as it is; what an earlier step suggests in `runtime.json` is where
the search begins; the rest begins at a conservative value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builders.evaluate.candidate import merged
from builders.tune.search import Point, Space
from serve.engines.factory import AnyEngineSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.model_directory import BuiltEngine
from serve.engines.trtllm.settings import TrtllmSettings

Search = Literal["off", "quick", "full"]
_BATCH = "max_batch_size"
_STEP = "max_num_tokens"
_GRAPHS = "cuda_graphs"
# Graphs of which batch sizes are recorded, by the memory they take.
_GRAPH_SETS = ("quarter", "half", "all", "dense")
_DENSE, _DENSE_TO = 8, 128  # distance of the batch sizes of `dense`, and how far they go: as the library's own list


@dataclass(frozen=True)
class Knob:
    """One setting that is searched.

    Attributes:
        name: Key in the engine's section; dots go into a section of it.
        values: By the memory they take, the least first.
        start: Index of the value to begin with.
        quick: Whether a quick search looks at it.
    """

    name: str
    values: tuple[Any, ...]
    start: int
    quick: bool = False


@dataclass(frozen=True)
class KnobSpace:
    """The knobs of one search.

    Attributes:
        knobs: In the order in which they are tried.
        section: The engine's section that they change.
    """

    knobs: tuple[Knob, ...]
    section: Mapping[str, Any]

    def settings(self, point: Point) -> dict[str, Any]:
        """Return the engine's section at a point."""
        section = dict(self.section)
        for knob, rung in zip(self.knobs, point, strict=True):
            section = merged(section, _nested(knob.name, knob.values[rung]))
        graphs = section.get(_GRAPHS)
        if isinstance(graphs, str):
            sizes = graph_sizes(graphs, section[_BATCH])
            others = {key: value for key, value in (self.section.get(_GRAPHS) or {}).items() if key != _BATCH}
            section[_GRAPHS] = {**others, "batch_sizes": list(sizes)}
        return section

    def named(self, point: Point) -> dict[str, Any]:
        """Return the values at a point, by knob."""
        return {knob.name: knob.values[rung] for knob, rung in zip(self.knobs, point, strict=True)}

    def to_search(self, is_valid: Callable[[dict[str, Any]], bool]) -> Space:
        """Return the space as the search sees it.

        Args:
            is_valid: Whether the engine takes a section.
        """
        names = [knob.name for knob in self.knobs]
        return Space(
            rungs=tuple(len(knob.values) for knob in self.knobs),
            start=tuple(knob.start for knob in self.knobs),
            is_valid=lambda point: is_valid(self.settings(point)),
            batch=names.index(_BATCH) if _BATCH in names else None,
        )


def make_space(
    base: AnyEngineSettings,
    section: Mapping[str, Any],
    fixed: Mapping[str, Any],
    *,
    search: Search,
    on_gpu: bool,
    built: BuiltEngine | None = None,
) -> KnobSpace:
    """Return what is searched.

    Args:
        base: The engine's settings of `section`.
        section: The engine's section as the candidate has it: the specification's, and an earlier step's suggestions.
        fixed: The specification's `engine` section: what it names is not searched.
        search: How thoroughly; off: nothing is searched.
        on_gpu: Whether the model runs on a GPU.
        built: Limits of a compiled engine, which no value exceeds.
    """
    if search == "off":
        return KnobSpace((), section)
    match base:
        case TransformersSettings():
            knobs = _transformers_knobs(section, on_gpu)
        case TrtllmSettings():
            knobs = _trtllm_knobs(section, base, built, thorough=search == "full")
        case _:
            knobs = ()
    kept = [knob for knob in knobs if not _names(fixed, knob.name) and (knob.quick or search == "full")]
    if _BATCH not in [knob.name for knob in kept]:  # the graphs' sizes follow from it
        kept = [knob for knob in kept if knob.name != _GRAPHS]
    return KnobSpace(tuple(kept), section)


def graph_sizes(which: str, batch: int) -> tuple[int, ...]:
    """Return the batch sizes whose decode steps are recorded as CUDA graphs.

    Args:
        which: quarter, half: powers of two up to that share of the batch; all: up to it; dense: every eighth size up to
            128, too.
        batch: Sequences that are computed together at most.
    """
    top = max(1, {"quarter": batch // 4, "half": batch // 2}.get(which, batch))
    sizes = {top, *(1 << power for power in range(top.bit_length()) if 1 << power <= top)}
    if which == "dense":
        sizes |= set(range(_DENSE, min(top, _DENSE_TO) + 1, _DENSE))
    return tuple(sorted(sizes))


def _transformers_knobs(section: Mapping[str, Any], on_gpu: bool) -> Sequence[Knob]:
    sizes = (512, 1024, 2048, 4096, 8192, 16384) if on_gpu else (128, 256, 512, 1024, 2048)
    knobs = [
        _ladder(_BATCH, (4, 8, 16, 32, 64, 128, 256), 16, section, quick=True),
        _ladder(_STEP, sizes, 2048 if on_gpu else 256, section, quick=True),
    ]
    if not {"kv_cache_tokens", "kv_cache_bytes"} & set(section):
        if on_gpu:
            knobs.append(_ladder("kv_cache_fraction", (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95), 0.7, section))
        elif "kv_cache_fraction" not in section:
            knobs.append(_ladder("kv_cache_tokens", (4096, 8192, 16384, 32768, 65536), 16384, section))
    return knobs


def _trtllm_knobs(
    section: Mapping[str, Any], base: TrtllmSettings, built: BuiltEngine | None, *, thorough: bool
) -> Sequence[Knob]:
    batches = _up_to((8, 16, 32, 64, 128, 256, 512, 1024, 2048), built.max_batch_size if built else None)
    sizes = _up_to((1024, 2048, 4096, 8192, 16384, 32768), built.max_num_tokens if built else None)
    knobs = [
        _ladder(_BATCH, batches, 64, section, quick=True),
        _ladder(_STEP, sizes, 4096, section, quick=True),
    ]
    if base.kv_cache.max_tokens is None and base.kv_cache.max_gpu_bytes is None:
        fractions = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
        knobs.append(_ladder("kv_cache.memory_fraction", fractions, 0.8, section))
    if base.backend != "tensorrt" and base.cuda_graphs.enabled:
        sets = _GRAPH_SETS if thorough else _GRAPH_SETS[-1:]  # they follow the batch in any case
        knobs.append(Knob(_GRAPHS, sets, len(sets) - 1, quick=True))
    return knobs


def _ladder(
    name: str, values: Sequence[float], start: float, section: Mapping[str, Any], *, quick: bool = False
) -> Knob:
    """Return a knob that begins at what the section says, or at the largest value up to `start`."""
    told = _get(section, name)
    begin = max((value for value in values if value <= start), default=values[0]) if told is None else told
    rungs = tuple(sorted({*values, begin}))
    return Knob(name, rungs, rungs.index(begin), quick)


def _up_to(values: Sequence[int], limit: int | None) -> tuple[int, ...]:
    return tuple(values) if limit is None else (*(value for value in values if value < limit), limit)


def _nested(name: str, value: Any) -> dict[str, Any]:
    *path, last = name.split(".")
    nested: dict[str, Any] = {last: value}
    for key in reversed(path):
        nested = {key: nested}
    return nested


def _get(section: Mapping[str, Any], name: str) -> Any:
    value: Any = section
    for key in name.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            return None
        value = value[key]
    return value


def _names(section: Mapping[str, Any], name: str) -> bool:
    return _get(section, name) is not None
