"""Show what would be called, without TensorRT-LLM: `python -m serve.engines.trtllm.explain CONFIG [--line newest]`.

`explain(config)` returns, for each line, the environment, the placement and the constructor call as Python text; or why
the line refuses the configuration. The module itself can be called, too.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import ValidationError

from serve.core.parallel import ParallelLayout
from serve.core.placement import PlacementError, PlacementPlan, plan_placement
from serve.core.strict_model import describe_mistakes
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.model_directory import DirectoryKind, ModelDirectory, read_model_directory
from serve.engines.trtllm.orchestration import Orchestration, OrchestratorKind, choose_orchestrator, engine_environ
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.signature_data import check_names
from serve.errors import BundleMismatch, ConfigError
from serve.yaml_file import read_yaml

_Section = TypeVar("_Section", TrtllmSettings, ParallelLayout)
_UNKNOWN_MODEL = "/path/to/model"
_BUILTIN = "builtin:"
_BUILTIN_MODELS = Path(__file__).parents[2] / "models"
_DEFAULT_REPLICA = {"CPU": 0.5}
_DEFAULT_RANK = {"CPU": 1.0, "GPU": 1.0}


@dataclass(frozen=True)
class Subject:
    """One model of a configuration.

    Attributes:
        name: Its id.
        settings, layout: Its engine's.
        model: Its directory, or the name of a built-in model.
    """

    name: str
    settings: TrtllmSettings
    layout: ParallelLayout
    model: str


@dataclass(frozen=True)
class LineAnswer:
    """What one line of TensorRT-LLM says to a model.

    Attributes:
        line: Which.
        text: Python text: the call, or a comment that says why it is refused.
        refusal: Why; None: the line takes it.
    """

    line: Line
    text: str
    refusal: str | None = None


class _Name(str):
    """A Python expression, shown as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(
    config: TrtllmSettings | Mapping[str, Any] | str | Path,
    line: Line | str | None = None,
    *,
    layout: ParallelLayout | None = None,
    placement: PlacementPlan | None = None,
) -> str:
    """Return the exact constructor calls as Python text.

    What replicas of a config file reserve is not told by the engine's part alone: serve.explain_config shows it, too.

    Args:
        config: Settings of the engine; or a dictionary of these, of a model, or of a whole config; or a config's path.
        line: Only this line; None: both.
        layout: How the engine is cut; None: as the config says, or not at all.
        placement: What a replica reserves, to be shown, and who starts the ranks; None: decided here, not shown.

    Raises:
        ConfigError: The config cannot be read, has a mistake, or has no model with the engine `trtllm`.
    """
    subjects = _found(config)
    lines = tuple(Line) if line is None else (_line(line),)
    if layout is not None:
        subjects = [replace(subject, layout=layout) for subject in subjects]
    return "\n".join(explain_line(subject, each, placement).text for subject in subjects for each in lines)


def _line(name: Line | str) -> Line:
    try:
        return Line(name)
    except ValueError:
        raise ConfigError(f"line {name!r} is unknown; use {' or '.join(Line)}") from None


def explain_line(subject: Subject, line: Line, placement: PlacementPlan | None = None) -> LineAnswer:
    """Plan the constructor call of one line, and check its names.

    Args:
        subject: The model.
        line: Of TensorRT-LLM.
        placement: As for `explain`.
    """
    heading, layout = f"# {subject.name} on TensorRT-LLM {line}", subject.layout
    try:
        model, notes = _model(subject.model)
        kind = _orchestrator(subject.settings, layout, model, line, placement)
        plan = placement or plan_placement(layout, kind, replica=_DEFAULT_REPLICA, rank=_DEFAULT_RANK)
        engine = plan_engine(subject.settings, layout, _orchestration(kind, layout, plan), model, line)
        check_names(engine.call, line)
    except (ConfigError, BundleMismatch, PlacementError) as exc:
        text = f"{heading} is refused:\n" + "".join(f"#   {text}\n" for text in str(exc).splitlines())
        return LineAnswer(line, text, str(exc))
    if subject.settings.orchestrator == "auto" and kind == "mpi":
        notes.append("orchestrator: auto takes ray where MPI cannot start processes (MPI_Comm_spawn).")
    parts = [heading, f"# backend: {engine.backend}; orchestrator: {kind}", *_placement_text(placement)]
    parts += [f"# note: {note}" for note in (*notes, *engine.notes)]
    return LineAnswer(line, "\n".join(parts + _python(engine)) + "\n")


def _orchestrator(
    settings: TrtllmSettings, layout: ParallelLayout, model: ModelDirectory, line: Line, placement: PlacementPlan | None
) -> OrchestratorKind:
    if placement is not None and placement.launcher != "torch_distributed":
        return placement.launcher
    tensorrt = settings.backend == "tensorrt" or model.kind is not DirectoryKind.HUGGING_FACE
    return choose_orchestrator(settings.orchestrator, layout, mpi_spawns=True, tensorrt=tensorrt and line is Line.V1_2)


def _orchestration(kind: OrchestratorKind, layout: ParallelLayout, plan: PlacementPlan) -> Orchestration:
    environ = engine_environ(kind, layout, {})
    if kind != "ray":
        return Orchestration(kind, environ=environ)
    indices = tuple(index for index, room in enumerate(plan.bundle_ranks) for _ in range(room))
    return Orchestration(kind, (_Name("placement_group"),), (indices,), environ)


def _model(path: str) -> tuple[ModelDirectory, list[str]]:
    directory = Path(path).expanduser()
    if path.startswith(_BUILTIN):
        directory = _BUILTIN_MODELS / path.removeprefix(_BUILTIN)
    if (directory / "config.json").is_file():
        return read_model_directory(directory), []
    model = ModelDirectory(directory.absolute(), tokenizer=directory.absolute())
    return model, [f"{model.path} is not on this machine; taken for a Hugging Face checkpoint."]


# Text


def _placement_text(plan: PlacementPlan | None) -> list[str]:
    if plan is None:
        return []
    shapes = [dict(bundle) for bundle in plan.bundles]
    return [f"# placement: {plan.strategy} {shapes}", f"# ranks in each bundle: {list(plan.bundle_ranks)}"]


def python_text(plan: EnginePlan) -> str:
    """Return a plan as a Python program."""
    return "\n".join(_python(plan))


def _python(plan: EnginePlan) -> list[str]:
    text = []
    if plan.environ:
        text.append("import os\n")
        for name, value in sorted(plan.environ.items()):
            text.append(f"os.environ.pop({name!r}, None)" if value is None else f"os.environ[{name!r}] = {value!r}")
        text.append("")
    if any(isinstance(group, _Name) for group in _groups(plan.call)):
        text += ["import ray", "placement_group = ray.util.get_current_placement_group()\n"]
    imports: dict[str, set[str]] = {}
    for call in plan.call.nested():
        module, _, name = call.target.partition(":")
        imports.setdefault(module, set()).add(name)
    text += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    return [*text, "", f"llm = {_show(plan.call, 0)}"]


def _groups(call: ConstructorCall) -> list[Any]:
    placement = call.keywords.get("ray_placement_config")
    return list(placement.keywords["placement_groups"]) if isinstance(placement, ConstructorCall) else []


def _show(value: Any, depth: int) -> str:
    if not isinstance(value, ConstructorCall):
        return repr(value)
    inner = "    " * (depth + 1)
    lines = [f"{inner}{keyword}={_show(part, depth + 1)},\n" for keyword, part in value.keywords.items()]
    return f"{value.class_name}(\n{''.join(lines)}{'    ' * depth})" if lines else f"{value.class_name}()"


# Configurations


def _found(config: TrtllmSettings | Mapping[str, Any] | str | Path) -> list[Subject]:
    subjects = list(_subjects(config))
    if not subjects:
        raise ConfigError("no model of this config has `engine: {kind: trtllm}`; nothing to explain")
    return subjects


def _subjects(config: TrtllmSettings | Mapping[str, Any] | str | Path) -> Iterator[Subject]:
    if isinstance(config, TrtllmSettings):
        yield Subject("engine", config, ParallelLayout(), _UNKNOWN_MODEL)
    elif isinstance(config, Mapping):
        yield from _in_document(config, "config")
    else:
        yield from _in_document(read_document(Path(config)), str(config))


def read_document(path: Path) -> Mapping[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    return _mapping(read_yaml(path), str(path))


def _in_document(document: Mapping[str, Any], source: str) -> Iterator[Subject]:
    """Find models at whatever level the document begins: Serve's file, our `args`, one model, or one engine."""
    if "applications" in document:
        for number, application in enumerate(_list(document["applications"], f"{source}: applications")):
            part = f"{source}: applications[{number}]"
            yield from _in_document(_mapping(_mapping(application, part).get("args") or {}, f"{part}.args"), part)
    elif "models" in document:
        for number, model in enumerate(_list(document["models"], f"{source}.models")):
            part = f"{source}.models[{number}]"
            yield from _in_document(_mapping(model, part), part)
    elif "engine" in document:
        engine = document["engine"]
        engine = {"kind": engine} if isinstance(engine, str) else _mapping(engine, f"{source}.engine")
        if engine.get("kind") == "trtllm":
            settings = _parsed(TrtllmSettings, engine, f"{source}.engine")
            layout = _parsed(ParallelLayout, document.get("parallel") or {}, f"{source}.parallel")
            model_name = str(document.get("model", f"{_BUILTIN}quickstart"))
            yield Subject(str(document.get("id", "model")), settings, layout, model_name)
    elif document.get("kind", "trtllm") == "trtllm" and "id" not in document:
        yield Subject("engine", _parsed(TrtllmSettings, document, source), ParallelLayout(), _UNKNOWN_MODEL)


def _mapping(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source} holds no mapping, but {value!r}; see configs/ for the form of a config file")
    return value


def _list(value: Any, source: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{source} holds no list, but {value!r}; see configs/ for the form of a config file")
    return list(value)


def _parsed(section: type[_Section], values: Any, source: str) -> _Section:
    try:
        return section.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, source)) from None


def main(arguments: list[str] | None = None) -> int:
    """Print the explanation of a config file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve.engines.trtllm.explain", description=__doc__)
    parser.add_argument("config", type=Path, help="a config file, or one that holds a model or an engine section")
    parser.add_argument("--line", choices=list(Line), help="only this line of TensorRT-LLM")
    options = parser.parse_args(arguments)
    try:
        lines = tuple(Line) if options.line is None else (Line(options.line),)
        answers = [explain_line(subject, line) for subject in _found(options.config) for line in lines]
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 1
    print("\n".join(answer.text for answer in answers))
    return 1 if all(answer.refusal is not None for answer in answers) else 0


class _CallableModule(ModuleType):
    """Lets `serve.engines.trtllm.explain(config)` work, where the name is this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
