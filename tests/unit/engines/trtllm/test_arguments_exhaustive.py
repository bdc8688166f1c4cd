"""No setting reaches nothing, and nothing is passed that does not exist: every setting, both lines, every backend."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import serve
from serve.core.parallel import ParallelLayout
from serve.core.strict_model import describe_mistakes
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import BuiltEngine, DirectoryKind, ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.signature_data import check_names, packaged
from serve.engines.trtllm.support import LIMITS
from serve.errors import ConfigError
from tests.unit.engines.trtllm.settings_walk import Setting, settings_of

MODEL = Path("/models/one")
BUILT = BuiltEngine("1.2.1", 1, 2, 1, 64, 4096, 8192, 32)

# These act while the engine runs, or on how it is started; the folder that holds their reader.
RUNTIME = {
    "orchestrator": "workers",
    "max_waiting": "engines/trtllm",
    "kv_cache.min_tokens": "engines/trtllm",
    "kv_cache.event_interval_s": "engines/trtllm",
    "stats.interval_s": "engines/trtllm",
    "start_timeout_s": "engines/trtllm",
    "stop_timeout_s": "engines/trtllm",
}


@dataclass(frozen=True)
class Case:
    """A line, a backend, and what it loads."""

    name: str
    line: Line
    backend: Backend
    model: ModelDirectory


CASES = [
    Case("1.2.x pytorch", Line.V1_2, Backend.PYTORCH, ModelDirectory(MODEL, tokenizer=MODEL)),
    Case("1.2.x tensorrt", Line.V1_2, Backend.TENSORRT, ModelDirectory(MODEL, tokenizer=MODEL)),
    Case(
        "1.2.x checkpoint", Line.V1_2, Backend.TENSORRT, ModelDirectory(MODEL, DirectoryKind.CHECKPOINT, MODEL)
    ),
    Case("1.2.x engine", Line.V1_2, Backend.TENSORRT, ModelDirectory(MODEL, DirectoryKind.ENGINE, MODEL, BUILT)),
    Case("newest pytorch", Line.NEWEST, Backend.PYTORCH, ModelDirectory(MODEL, tokenizer=MODEL)),
]  # fmt: skip
SETTINGS = list(settings_of(TrtllmSettings))


def outcome(document: dict[str, Any], case: Case) -> EnginePlan | str:
    """Return the plan for a configuration, or why it is refused."""
    backend = "tensorrt" if case.backend is Backend.TENSORRT else "auto"
    try:
        settings = TrtllmSettings.model_validate({"backend": backend} | document)
        plan = plan_engine(settings, ParallelLayout(pipeline=2), Orchestration("mpi"), case.model, case.line)
        check_names(plan.call, case.line)
    except ValidationError as exc:
        return describe_mistakes(exc, "engine")
    except ConfigError as exc:
        return str(exc)
    return plan


def what_is_passed(plan: EnginePlan) -> tuple[ConstructorCall, dict[str, str | None]]:
    return plan.call, dict(plan.environ)


def names_it(message: str, setting: Setting) -> bool:
    """Whether a refusal names the setting, or the optional section around it."""
    parts = [re.escape(part) for part in setting.path]
    paths = [r"\.".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return bool(re.search(rf"\b({'|'.join((*paths, parts[-1]))})\b", message))


@cache
def effect(setting: Setting, case: Case) -> str:
    """Return `passed`, `refused`, or `ignored`; a refusal that does not name the setting is a failure."""
    with_it = outcome(setting.document(), case)
    if isinstance(with_it, str):
        assert names_it(with_it, setting), f"{setting.name}={setting.value!r} is not named by: {with_it}"
        return "refused"
    without = outcome(setting.base, case)
    if isinstance(without, str):
        return "passed"
    return "ignored" if what_is_passed(with_it) == what_is_passed(without) else "passed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting.name}={setting.value}")
def test_a_setting_is_passed_or_refused(setting: Setting, case: Case) -> None:
    if setting.name == "backend":
        return
    assert effect(setting, case) in {"ignored" if setting.name in RUNTIME else "passed", "refused"}


@pytest.mark.parametrize("name", sorted({setting.name for setting in SETTINGS} - set(RUNTIME) - {"backend"}))
def test_each_setting_is_passed_somewhere(name: str) -> None:
    effects = {effect(setting, case) for setting in SETTINGS if setting.name == name for case in CASES}
    assert "passed" in effects


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting.name}={setting.value}")
def test_each_value_is_passed_somewhere(setting: Setting) -> None:
    if setting.name in RUNTIME or setting.name == "backend":
        return
    assert "passed" in {effect(setting, case) for case in CASES}


@pytest.mark.parametrize("name", RUNTIME)
def test_settings_of_the_run_time_have_a_reader(name: str) -> None:
    folder = Path(str(serve.__file__)).parent / RUNTIME[name]
    readers = [file for file in folder.rglob("*.py") if not file.name.startswith("settings")]
    assert any(re.search(rf"\.{name.split('.')[-1]}\b", file.read_text()) for file in readers)


def test_only_settings_are_listed_as_read_at_run_time() -> None:
    assert set(RUNTIME) <= {setting.name for setting in SETTINGS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_defaults_are_a_valid_call(case: Case) -> None:
    plan = outcome({}, case)
    assert isinstance(plan, EnginePlan)
    assert plan.backend is case.backend


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.path)
def test_the_table_of_limits_names_settings(limit: Any) -> None:
    paths = {setting.name for setting in SETTINGS}
    assert any(path == limit.path or path.startswith(f"{limit.path}.") for path in paths)


@pytest.mark.parametrize("line", list(Line))
def test_every_stored_class_of_a_call_is_used(line: Line) -> None:
    """A class that no setting can produce would be stored in vain; those below are for `extra`."""
    used = {
        part.target
        for setting in SETTINGS
        for case in CASES
        if case.line is line and isinstance(plan := outcome(setting.document(), case), EnginePlan)
        for part in plan.call.nested()
    }
    only_for_extra = {"KVEventsConfig", "RayPlacementConfig"}  # or for the ray orchestrator
    if line is Line.NEWEST:
        only_for_extra |= {"DynamicBatchConfig"}
    assert {target for target in packaged(line) if target.partition(":")[2] not in only_for_extra} == used
