"""What is built when a build failed."""

from typing import Any

import pytest

from builders.context import StepName
from builders.fallback import fallback_spec
from builders.resources import step_resources
from builders.spec import BuildSpec, parse_spec
from serve.artifacts.manifest import BundleKind


def spec(**changes: Any) -> BuildSpec:
    document = {
        "name": "m",
        "kind": "tensorrt-engine",
        "quantize": "fp8",
        "engine": {"dtype": "float16"},
        "parallel": {"tensor": 2, "pipeline": 2},
        "target": {"accelerator": "H100", "engine_env": {"py_executable": "/opt/python"}},
        "verify": {"tasks": [{"name": "t", "file": "x", "metric": "regex"}], "texts": {"samples": 100}},
        "fallback": "transformers",
    }
    return parse_spec(document | changes)


def test_it_is_the_unquantized_checkpoint_for_the_transformers_engine() -> None:
    made = fallback_spec(spec())
    assert made is not None
    assert made.kind is BundleKind.TRANSFORMERS_CHECKPOINT
    assert made.quantize.recipe == "none"
    assert (made.name, made.source, made.store) == (spec().name, spec().source, spec().store)
    assert made.engine == {}
    assert made.fallback is None


def test_it_runs_on_the_same_gpus_and_in_our_environment() -> None:
    made = fallback_spec(spec())
    assert made is not None
    assert made.parallel.tensor == 4
    resources = step_resources(made, StepName.VERIFY)
    assert sum(bundle.get("GPU", 0) for bundle in resources.bundles) == 4
    assert not resources.engine_env


def test_it_is_verified_quickly() -> None:
    made = fallback_spec(spec())
    assert made is not None
    assert made.tune.search == "off"
    assert made.verify.texts.samples == 8
    assert made.verify.tasks == ()


@pytest.mark.parametrize(
    "changes",
    [{"fallback": None}, {"kind": "transformers-checkpoint", "quantize": "none", "engine": {}, "parallel": {}}],
)
def test_without_one_or_if_it_failed_itself_there_is_none(changes: dict[str, Any]) -> None:
    assert fallback_spec(spec(**changes)) is None
