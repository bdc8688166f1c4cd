"""The compile step for the PyTorch backend: settings to start with, and what a first start leaves for later ones."""

import json
import os
from typing import Any

from builders.compile.engine_job import EngineJob, run_job
from builders.compile.prepare import prepared_section
from builders.compile.subject import Compiled, read_subject
from builders.context import StepContext
from serve.artifacts.manifest import CACHES, RUNTIME, BundleRuntime
from serve.engines.trtllm.arguments import plan_engine
from serve.engines.trtllm.jit_caches import FOLDER, cache_environ, collect_caches, origin_of
from serve.engines.trtllm.line import Installation, detect
from serve.engines.trtllm.model_directory import read_model_directory
from serve.engines.trtllm.orchestration import Orchestration, engine_environ
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

_SHARE = 0.95  # of the step's time limit


def prepare(context: StepContext) -> dict[str, Any]:
    """Prepare, as `builders.steps.compile` says."""
    compiled = read_subject(context)
    section = prepared_section(compiled.settings, compiled.sizes, compiled.kv_algorithm)
    installation = _installation()
    caches, parts_s, notes = _warm(context, compiled, section, installation)
    runtime = BundleRuntime(engine=section)
    (context.output / RUNTIME).write_text(json.dumps(runtime.model_dump(mode="json"), indent=2) + "\n")
    context.progress(1.0, 1.0, "prepared")
    sizes = compiled.sizes
    return {
        "line": installation.line.value if installation else None,
        "version": installation.version if installation else None,
        "sizes": {
            "max_batch_size": sizes.max_batch_size,
            "max_num_tokens": sizes.max_num_tokens,
            "context_tokens": sizes.context_tokens,
        },
        "reasons": sizes.reasons,
        "graph_batch_sizes": section.get("cuda_graphs", {}).get("batch_sizes", []),
        "caches": caches,
        "parts_s": parts_s,
        "notes": notes,
    }


def _installation() -> Installation | None:
    try:
        return detect()
    except ConfigError:
        return None


def _warm(
    context: StepContext, compiled: Compiled, section: dict[str, Any], installation: Installation | None
) -> tuple[dict[str, int], dict[str, float], list[str]]:
    """Start the engine once; return what it left in its caches, how long that took, and notes."""
    reason = _why_not(context, compiled.settings, installation)
    if installation is None or reason is not None:
        return {}, {}, [f"No caches are kept: {reason}."]
    caches = context.scratch / "caches"
    settings = TrtllmSettings.model_validate(_merged(compiled.settings, section))
    environ = {**cache_environ(caches), **settings.environment}
    settings = settings.model_copy(update={"environment": environ})
    layout, model = context.spec.parallel, read_model_directory(context.weights)
    orchestration = Orchestration("mpi" if layout.world_size > 1 else "in_process")
    launch = engine_environ(orchestration.kind, layout, os.environ)
    plan = plan_engine(settings, layout, orchestration, model, installation.line, installation.version)
    job = EngineJob(
        "warm", plan.call, plan.line.value, {**launch, **plan.environ}, str(context.output), settings.stop_timeout_s
    )
    report = run_job(
        job,
        context.scratch / "start.log",
        context.spec.target.time_limit_s * _SHARE,
        lambda stage: context.progress(0.1, 1.0, stage),
    )
    origin = origin_of(report.version, context.node)
    kept = collect_caches(caches, context.output / CACHES / FOLDER, origin)
    notes = [] if kept else [f"TensorRT-LLM {report.version} left nothing in its caches: starts are not shortened."]
    return kept, report.parts_s, notes


def _why_not(context: StepContext, settings: TrtllmSettings, installation: Installation | None) -> str | None:
    layout = context.spec.parallel
    if not context.spec.compile.warm_start:
        return "compile.warm_start is false"
    if installation is None:
        return "TensorRT-LLM is not installed where this step ran"
    if settings.orchestrator == "ray" or (layout.gpus_per_node or layout.world_size) < layout.world_size:
        # The step is one process on one node; Ray's ranks need a placement group.
        return "the engine's ranks are started by Ray, which this step does not"
    return None


def _merged(settings: TrtllmSettings, section: dict[str, Any]) -> dict[str, Any]:
    base = settings.model_dump(mode="python", exclude_unset=True)
    for key, value in section.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base
