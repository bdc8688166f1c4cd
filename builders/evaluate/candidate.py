"""Candidate: a bundle's directory before it is published, and the settings that its engine starts with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from builders.context import StepContext, StepName
from builders.errors import BuildFailed
from builders.evaluate.engines import EnginePlace
from builders.resources import engine_plan, engine_settings
from builders.texts.encoder import PromptEncoder
from serve.artifacts.manifest import MODEL, RUNTIME, TOKENIZER, BundleRuntime
from serve.core.strict_model import describe_mistakes
from serve.engines.factory import AnyEngineSettings


@dataclass(frozen=True)
class Candidate:
    """What tune and verify look at.

    Attributes:
        place: Its engine.
        encoder: Its tokenizer.
        section: The engine's section, as a model's configuration would have it: the specification's and, over it, what
            `runtime.json` says.
    """

    place: EnginePlace
    encoder: PromptEncoder
    section: Mapping[str, Any]


def read_candidate(context: StepContext, step: StepName) -> Candidate:
    """Read the candidate of a step.

    Raises:
        BuildFailed: There is none, or an earlier step wrote settings that its engine does not have.
        ConfigError: Its tokenizer cannot be read, or its ranks cannot be placed.
    """
    directory = context.candidate
    if directory is None:
        raise BuildFailed(step.value, "there is no candidate to look at; an earlier step has made none")
    section = merged(context.spec.engine, _runtime(directory, step).engine)
    settings = settings_of(context, step, section)
    plan = engine_plan(context.spec, step)
    return Candidate(EnginePlace(settings, directory / MODEL, plan), PromptEncoder(directory / TOKENIZER), section)


def settings_of(context: StepContext, step: StepName, section: Mapping[str, Any]) -> AnyEngineSettings:
    """Return the engine's settings of a section.

    Raises:
        BuildFailed: They exclude each other, or there is no such setting.
    """
    try:
        spec = context.spec.model_copy(update={"engine": dict(section)})
        return engine_settings(spec, step)
    except ValidationError as exc:
        mistakes = describe_mistakes(exc, "engine")
        raise BuildFailed(step.value, f"the engine does not take the settings of {RUNTIME}: {mistakes}") from None
    except ValueError as exc:
        raise BuildFailed(step.value, f"the engine does not take the settings of {RUNTIME}: {exc}") from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings of which the second come before the first."""
    result = dict(base)
    for key, value in over.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = merged(before, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return result


def _runtime(directory: Path, step: StepName) -> BundleRuntime:
    try:
        return BundleRuntime.model_validate_json((directory / RUNTIME).read_bytes())
    except FileNotFoundError:
        return BundleRuntime()
    except ValidationError as exc:
        raise BuildFailed(step.value, f"{RUNTIME} of the candidate cannot be read: {exc}") from exc
