"""What TensorRT-LLM would be called with for a config file, and what its replicas reserve."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.artifacts.store import open_store
from serve.bundle_models import resolve_model
from serve.config import AppConfig, ModelConfig, parse_app_config, parse_applications
from serve.core.placement import PlacementError, PlacementPlan
from serve.engines.trtllm.explain import LineAnswer, Subject, explain_line, read_document
from serve.engines.trtllm.explain import explain as explain_engine
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.workers.launch import plan_launch


@dataclass(frozen=True)
class Explanation:
    """Python text, and whether any line takes any model of the config."""

    text: str
    works: bool


def explain_file(path: Path, line: str | None = None) -> Explanation:
    """Explain a config file, the `args` of one application, one model, or one engine's section.

    Checkpoints that are not on this machine are taken for Hugging Face ones, which a note says. Bundles are looked up.

    Args:
        path: Of a YAML file.
        line: Only this one; None: both.

    Raises:
        ConfigError: It cannot be read, has a mistake, or has no model with the engine `trtllm`.
    """
    document = read_document(path)
    if "applications" not in document and "models" not in document and "id" not in document:
        return Explanation(explain_engine(document, line), works=True)
    lines = tuple(Line) if line is None else (Line(line),)
    answers = [
        answer
        for config in _configs(document, str(path))
        for model in (resolve_model(model, open_store).config for model in config.models)
        if isinstance(model.engine, TrtllmSettings)
        for answer in explain_model(model, model.engine, lines)
    ]
    if not answers:
        raise ConfigError(f"{path}: no model has `engine: trtllm`; nothing to explain")
    return Explanation(
        "\n".join(answer.text for answer in answers), works=any(answer.refusal is None for answer in answers)
    )


def explain_model(
    model: ModelConfig, engine: TrtllmSettings, lines: tuple[Line, ...] = tuple(Line)
) -> Iterator[LineAnswer]:
    """Explain one model, as its replicas would be placed where MPI works.

    Args:
        model: Its configuration.
        engine: The settings of its engine.
        lines: Of TensorRT-LLM.

    Raises:
        ConfigError: Its ranks cannot be placed.
    """
    subject = Subject(model.id, engine, model.parallel, str(model.directory))
    placement = _placement(model)
    for line in lines:
        yield explain_line(subject, line, placement)


def usable_lines(model: ModelConfig, engine: TrtllmSettings) -> list[Line]:
    """Return the lines of TensorRT-LLM that can run a model.

    Raises:
        ConfigError: None can; says why of each.
    """
    answers = list(explain_model(model, engine))
    refusals = [f"TensorRT-LLM {answer.line}: {answer.refusal}" for answer in answers if answer.refusal is not None]
    if len(refusals) == len(answers):
        raise ConfigError(f"models[{model.id}]: no line of TensorRT-LLM can run it:\n" + "\n".join(refusals))
    return [answer.line for answer in answers if answer.refusal is None]


def _placement(model: ModelConfig) -> PlacementPlan:
    try:
        return plan_launch(
            model.engine,
            model.parallel,
            model.resources,
            mpi_works=lambda: True,
            model_dir=model.directory if (model.directory / "config.json").is_file() else None,
            own_process=model.engine_env is not None or model.fallback is not None,
        )
    except PlacementError as exc:
        raise ConfigError(f"models[{model.id}].parallel: {exc}") from None
    except ConfigError as exc:
        raise ConfigError(f"models[{model.id}]: {exc}") from None


def _configs(document: Mapping[str, Any], source: str) -> list[AppConfig]:
    if "applications" in document:
        return list(parse_applications(document, source, check_files=False).values())
    return [parse_app_config(document if "models" in document else {"models": [document]}, source)]
