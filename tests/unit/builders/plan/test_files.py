"""What --write writes is read by `raytrt build` and by the service, and says what was planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders.plan.choose import Choice, choose
from builders.plan.files import build_spec, bundle_name, deployment_config, write_files
from builders.plan.request import PlanRequest
from builders.spec import BuildSpec, read_spec
from serve.artifacts.manifest import BundleKind
from serve.config import AppConfig, parse_applications
from serve.engines.simulated.hardware import CPU_CORE
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError
from serve.yaml_file import read_yaml
from tests.unit.builders.plan.requests import CHAT, offer, planned, request

STORE = "~/.raytrt/store"


def written(directory: Path, asked: PlanRequest) -> tuple[Choice, BuildSpec, AppConfig]:
    choice = choose(asked)
    assert choice is not None
    paths = write_files(directory, asked, choice.best, bundle_name(asked, choice.best), STORE)
    assert [path.name for path in paths] == ["build.yaml", "deployment.yaml"]
    configs = parse_applications(read_yaml(paths[1]), str(paths[1]))
    return choice, read_spec(paths[0]), configs["llm"]


def test_files_say_what_was_planned(tmp_path: Path) -> None:
    choice, spec, app = written(tmp_path / "new", request("llama-3.3-70b", rate_per_s=10, **{**CHAT, "ttft_ms": 500}))
    best = choice.best
    assert (spec.kind, spec.source.location) == (BundleKind.TRTLLM_CHECKPOINT, "/models/llama-3.3-70b")
    assert (spec.quantize.recipe, spec.quantize.kv_cache) == (best.candidate.recipe, best.candidate.kv_cache)
    assert spec.parallel.tensor == best.candidate.split.tensor
    assert spec.target.accelerator == "H100"
    assert spec.compile.max_batch_size == best.sizes.max_batch_size
    assert (spec.tune.prompt_tokens, spec.tune.output_tokens, spec.tune.ttft_ms) == (1000, 200, 500.0)
    engine = spec.engine_settings()
    assert isinstance(engine, TrtllmSettings)
    assert (engine.max_batch_size, engine.max_num_tokens) == (best.sizes.max_batch_size, best.sizes.max_num_tokens)
    (model,) = app.models
    assert spec.aliases == ("prod",)
    assert (model.bundle, model.replicas) == (f"{STORE}/{spec.name}@prod", best.replicas)
    assert model.resources.accelerator_type == "H100"
    assert model.limits.max_ongoing_requests >= best.sizes.limits.sequences


@pytest.mark.parametrize(
    ("asked", "section", "expected"),
    [
        (request("deepseek-v3", "h200", rate_per_s=5), "attention_dp", None),
        (request("gpt-oss-20b", rate_per_s=5), "kv_cache", {"attention_windows": [128, 131072]}),
        (request("gemma-3-27b", "h200", rate_per_s=2), "kv_cache", {"attention_windows": [1024] * 5 + [131072]}),
        (request("llama-4-scout", rate_per_s=2, context_tokens=20_000), "kv_cache", None),
        (request(kind=BundleKind.TENSORRT_ENGINE, rate_per_s=2), "cuda_graphs", None),
    ],
)
def test_engine_sections_follow_the_model(tmp_path: Path, asked: PlanRequest, section: str, expected: Any) -> None:
    choice, spec, _ = written(tmp_path, asked)
    if section == "attention_dp":
        expected = {"enabled": True} if choice.best.candidate.split.attention_dp else None
    assert spec.engine.get(section) == expected


def test_all_candidates_make_good_files() -> None:
    """Also those that were not chosen."""
    for asked in (
        request("mixtral-8x7b", "h100,b200,gb200", rate_per_s=20),
        request("llama-3.1-405b", "h100", rate_per_s=1),
        request("llama-3.1-8b", "a100-40gb", kind=BundleKind.TENSORRT_ENGINE, rate_per_s=20),
        request("llama-3.1-8b", "l40s", kind=BundleKind.TRANSFORMERS_CHECKPOINT, rate_per_s=5),
    ):
        choice = choose(asked)
        assert choice is not None
        for evaluation in choice.ranked:
            name = bundle_name(asked, evaluation)
            BuildSpec.model_validate(build_spec(asked, evaluation, name, "s3://bundles"))
            document = deployment_config(asked, evaluation, name, "s3://bundles")
            assert parse_applications(document, "deployment")["llm"].models[0].replicas == evaluation.replicas


def test_a_machine_without_gpus_gets_the_transformers_engine(tmp_path: Path) -> None:
    asked = request("qwen2.5-0.5b", kind=BundleKind.TRANSFORMERS_CHECKPOINT, rate_per_s=0.01, output_tokens=50)
    asked = replace(asked, offers=(replace(offer(), key="cpu", gpu=CPU_CORE, node_gpus=1),))
    _, spec, app = written(tmp_path, asked)
    assert spec.engine == {"kind": "transformers", "max_batch_size": 12, "max_num_tokens": 512, "num_threads": 1}
    assert spec.target.accelerator is None
    assert app.models[0].resources.accelerator_type is None


def test_nothing_is_overwritten_and_a_source_is_needed(tmp_path: Path) -> None:
    asked = request(rate_per_s=1)
    written(tmp_path, asked)
    with pytest.raises(ConfigError, match=r"build.yaml is there already; name another directory"):
        written(tmp_path, asked)
    nowhere = replace(asked, model=replace(planned(), location=None))
    with pytest.raises(ConfigError, match="it is not known where the checkpoint is; name it by --source"):
        written(tmp_path / "other", nowhere)
