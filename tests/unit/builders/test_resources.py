"""What each step of a build reserves."""

from typing import Any

import pytest

from builders.context import StepName
from builders.resources import engine_plan, engine_settings, step_resources
from builders.spec import BuildSpec, parse_spec
from serve.core.placement import Resources
from serve.engines.transformers.settings import TransformersSettings

GIB = 2**30
H100 = {"accelerator": "H100", "num_cpus": 8, "memory_bytes": 64 * GIB}
ENV = {"py_executable": "/opt/trtllm/bin/python"}


def spec(**changes: Any) -> BuildSpec:
    return parse_spec({"name": "m", "kind": "trtllm-checkpoint", "quantize": "fp8", "target": H100} | changes)


def total(build: BuildSpec, step: StepName) -> Resources:
    bundles = step_resources(build, step).bundles
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}


@pytest.mark.parametrize("step", list(StepName))
def test_without_an_accelerator_no_gpu_is_reserved(step: StepName) -> None:
    build = spec(target={"num_cpus": 2})
    assert "GPU" not in total(build, step)
    assert not any(name.startswith("accelerator") for name in total(build, step))


@pytest.mark.parametrize("step", list(StepName))
def test_every_step_goes_to_nodes_of_the_accelerator(step: StepName) -> None:
    assert total(spec(), step)["accelerator_type:H100"] > 0


def test_a_step_that_loads_the_model_has_all_that_the_target_says() -> None:
    assert total(spec(), StepName.QUANTIZE) == {
        "CPU": 8, "GPU": 1, "memory": 64 * GIB, "accelerator_type:H100": 0.001,
    }  # fmt: skip


@pytest.mark.parametrize("step", [StepName.FETCH, StepName.PUBLISH])
def test_a_step_that_moves_files_takes_a_core_and_no_gpu(step: StepName) -> None:
    assert total(spec(), step) == {"CPU": 1, "accelerator_type:H100": 0.001}


@pytest.mark.parametrize("step", [StepName.QUANTIZE, StepName.COMPILE])
def test_steps_that_see_the_whole_model_get_the_gpus_of_all_ranks(step: StepName) -> None:
    build = spec(parallel={"tensor": 4})
    assert total(build, step)["GPU"] == 4
    assert len(step_resources(build, step).bundles) == 1


def test_of_a_layout_over_nodes_they_get_those_of_one() -> None:
    build = spec(parallel={"tensor": 4, "pipeline": 2, "gpus_per_node": 4})
    assert total(build, StepName.QUANTIZE)["GPU"] == 4


@pytest.mark.parametrize("step", [StepName.REFERENCE, StepName.TUNE, StepName.VERIFY])
def test_steps_that_start_an_engine_reserve_what_its_ranks_take(step: StepName) -> None:
    build = spec(parallel={"tensor": 4})
    resources = step_resources(build, step)
    plan = engine_plan(build, step)
    assert (resources.bundles, resources.strategy, resources.process) == (plan.bundles, plan.strategy, plan.replica)
    assert total(build, step)["GPU"] == 4
    assert total(build, step)["CPU"] == pytest.approx(8.5)
    assert total(build, step)["memory"] == 64 * GIB


def test_ranks_on_several_nodes_are_spread_over_them() -> None:
    resources = step_resources(spec(parallel={"tensor": 2, "pipeline": 2, "gpus_per_node": 2}), StepName.TUNE)
    assert resources.strategy == "STRICT_SPREAD"
    assert [bundle["GPU"] for bundle in resources.bundles] == [2, 2]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (StepName.QUANTIZE, {"quantize": {"recipe": "fp8", "device": "cpu"}}),
        (StepName.REFERENCE, {"verify": {"reference_engine": "transformers", "reference_device": "cpu"}}),
    ],
)
def test_what_is_computed_on_the_cpu_takes_no_gpu(step: StepName, changes: dict[str, Any]) -> None:
    assert "GPU" not in total(spec(**changes), step)


@pytest.mark.parametrize("step", list(StepName))
def test_the_engines_environment_is_for_steps_that_load_tensorrt_llm(step: StepName) -> None:
    build = spec(target=H100 | {"engine_env": ENV})
    ours = {StepName.FETCH, StepName.QUANTIZE}
    assert step_resources(build, step).engine_env is (step not in ours)
    plain = spec(kind="transformers-checkpoint", quantize="none", target=H100 | {"engine_env": ENV})
    assert not step_resources(plain, step).engine_env


def test_a_reference_by_transformers_is_made_in_our_environment() -> None:
    build = spec(target=H100 | {"engine_env": ENV}, verify={"reference_engine": "transformers"})
    assert not step_resources(build, StepName.REFERENCE).engine_env
    assert isinstance(engine_settings(build, StepName.REFERENCE), TransformersSettings)


@pytest.mark.parametrize(
    ("kind", "step", "backend"),
    [
        ("tensorrt-engine", StepName.TUNE, "tensorrt"),
        ("tensorrt-engine", StepName.REFERENCE, "pytorch"),
        ("trtllm-checkpoint", StepName.VERIFY, "pytorch"),
    ],
)
def test_an_engine_has_the_backend_that_loads_what_it_is_given(kind: str, step: StepName, backend: str) -> None:
    settings = engine_settings(spec(kind=kind), step)
    assert settings.kind == "trtllm"
    assert settings.backend == backend
