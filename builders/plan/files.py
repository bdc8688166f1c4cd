"""What a plan is written as: a build's specification, and a deployment's configuration that serves its bundle."""

import math
from pathlib import Path
from typing import Any

import yaml

from builders.plan.choose import output_tokens_per_s
from builders.plan.evaluate import Evaluation
from builders.plan.goal import Goal
from builders.plan.request import PlanRequest
from builders.plan.sizes import groups
from builders.spec import parse_spec
from serve.artifacts.manifest import BundleKind
from serve.config import parse_applications
from serve.errors import ConfigError

BUILD_FILE, DEPLOYMENT_FILE = "build.yaml", "deployment.yaml"
# By an alias, not @latest: replicas go back to the bundle that an alias pointed to before.
_ALIAS = "prod"
# Streamed tokens that one gateway process passes on: two thirds of what `benchmarks/gateway.py` has it hold.
_GATEWAY_TOKENS_PER_S = 20_000
_DEPLOYMENT_COMMENT = """# Serves what build.yaml publishes.
#   raytrt up deployment.yaml         or, on a cluster that runs:  raytrt deploy deployment.yaml
"""
_TUNE_TTFT_MS, _TUNE_TPOT_MS = 2000.0, 50.0


def write_files(directory: Path, request: PlanRequest, evaluation: Evaluation, name: str, store: str) -> list[Path]:
    """Write both files, checked as `raytrt build` and `raytrt check` would; returns their paths.

    Raises:
        ConfigError: It is not known where the checkpoint is, or a file is there already.
    """
    spec, deployment = build_spec(request, evaluation, name, store), deployment_config(request, evaluation, name, store)
    parse_spec(spec, BUILD_FILE)
    parse_applications(deployment, DEPLOYMENT_FILE, check_files=False)
    paths = [directory / BUILD_FILE, directory / DEPLOYMENT_FILE]
    for path in paths:
        if path.exists():
            raise ConfigError(f"--write: {path} is there already; name another directory, or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(_text(_comment(request, evaluation) + "#   raytrt build build.yaml\n", spec))
    paths[1].write_text(_text(_DEPLOYMENT_COMMENT, deployment))
    return paths


def bundle_name(request: PlanRequest, evaluation: Evaluation) -> str:
    """Return a name for the bundle: model, GPU, recipe and layout."""
    candidate = evaluation.candidate
    recipe = {"none": []}.get(candidate.recipe, [candidate.recipe.replace("_", "-")])
    world = [candidate.layout.replace(" ", "-").lower()] if candidate.split.world_size > 1 else []
    return "-".join([request.model.name.lower(), candidate.offer.key, *recipe, *world])[:100]


def build_spec(request: PlanRequest, evaluation: Evaluation, name: str, store: str) -> dict[str, Any]:
    """Return the specification as a YAML document.

    Raises:
        ConfigError: It is not known where the checkpoint is.
    """
    if request.model.location is None:
        raise ConfigError("--write: it is not known where the checkpoint is; name it by --source")
    candidate, goal, sizes = evaluation.candidate, request.goal, evaluation.sizes
    document: dict[str, Any] = {
        "name": name,
        "store": store,
        "kind": str(candidate.kind),
        "source": request.model.location,
        "aliases": [_ALIAS],
    }
    document["quantize"] = {"recipe": candidate.recipe}
    if candidate.kv_cache != "auto" and candidate.recipe != "none":
        document["quantize"]["kv_cache"] = candidate.kv_cache
    if parallel := _parallel(evaluation):
        document["parallel"] = parallel
    if candidate.offer.gpu.accelerator_type is not None:
        document["target"] = {"accelerator": candidate.offer.gpu.accelerator_type}
    document["engine"] = engine_section(request, evaluation)
    if candidate.kind is not BundleKind.TRANSFORMERS_CHECKPOINT:
        document["compile"] = {
            "max_batch_size": sizes.max_batch_size,
            "max_num_tokens": sizes.max_num_tokens,
            "context_tokens": context_tokens(request, evaluation),
        }
    document["tune"] = _tune(goal)
    return document


def engine_section(request: PlanRequest, evaluation: Evaluation) -> dict[str, Any]:
    """Return the settings that the engine starts from."""
    candidate, sizes = evaluation.candidate, evaluation.sizes
    section: dict[str, Any] = {"kind": candidate.kind.engine, "max_batch_size": sizes.max_batch_size}
    if candidate.kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        threads = {"num_threads": 1} if candidate.offer.gpu.generation == "cpu" else {}
        return {**section, "max_num_tokens": sizes.max_num_tokens, **threads}
    context = context_tokens(request, evaluation)
    section |= {"max_num_tokens": sizes.max_num_tokens, "context_tokens": context}
    if candidate.kind is BundleKind.TENSORRT_ENGINE:
        return section
    section["cuda_graphs"] = {"max_batch_size": sizes.max_batch_size}
    if candidate.split.attention_dp:
        section["attention_dp"] = {"enabled": True}
    if (pattern := request.model.shape.window_pattern(context)) is not None:
        section["kv_cache"] = {"attention_windows": [min(window, context) for window in pattern]}
    return section


def context_tokens(request: PlanRequest, evaluation: Evaluation) -> int:
    """Return how long prompt and output may be together."""
    longest = min(request.model.shape.context_tokens, evaluation.longest)
    return min(longest, request.goal.context_tokens or longest)


def deployment_config(request: PlanRequest, evaluation: Evaluation, name: str, store: str) -> dict[str, Any]:
    """Return the configuration of a service with the planned replicas, as a YAML document."""
    candidate, sizes = evaluation.candidate, evaluation.sizes
    model: dict[str, Any] = {
        "id": request.model.name.lower(),
        "bundle": f"{store}/{name}@{_ALIAS}",
        "replicas": evaluation.replicas,
        "limits": {"max_ongoing_requests": max(64, 2 * sizes.max_batch_size * groups(candidate))},
    }
    if candidate.offer.gpu.accelerator_type is not None:
        model["resources"] = {"accelerator_type": candidate.offer.gpu.accelerator_type}
    output = output_tokens_per_s(evaluation, request)
    gateway = {"replicas": max(1, math.ceil(output / _GATEWAY_TOKENS_PER_S))}
    application = {
        "name": "llm",
        "import_path": "serve.app:build_app",
        "route_prefix": "/",
        "args": {"models": [model], "gateway": gateway},
    }
    return {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": [application]}


def _parallel(evaluation: Evaluation) -> dict[str, Any]:
    split = evaluation.candidate.split
    return split.model_dump(exclude={"attention_dp"}, exclude_defaults=True)


def _tune(goal: Goal) -> dict[str, Any]:
    return {
        "prompt_tokens": goal.input_tokens,
        "output_tokens": goal.output_tokens,
        "ttft_ms": goal.ttft_ms or _TUNE_TTFT_MS,
        "tpot_ms": goal.tpot_ms or _TUNE_TPOT_MS,
        "percentile": goal.percentile,
    }


def _comment(request: PlanRequest, evaluation: Evaluation) -> str:
    goal, state, candidate = request.goal, evaluation.state, evaluation.candidate
    assert state is not None
    rate = "" if goal.rate_per_s is None else f"{goal.rate_per_s:g} requests/s of "
    return (
        f"# Planned for {rate}{goal.input_tokens} + {goal.output_tokens} tokens: {evaluation.replicas} x "
        f"({candidate.layout} on {candidate.offer.gpu.name}),\n# expected TTFT {state.ttft_s * 1e3:.0f} ms and TPOT "
        f"{state.tpot_s * 1e3:.1f} ms at the {goal.percentile:g}th percentile.\n"
    )


def _text(comment: str, document: dict[str, Any]) -> str:
    return comment + yaml.safe_dump(document, sort_keys=False, width=120)
