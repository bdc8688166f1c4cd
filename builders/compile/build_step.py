"""The compile step for engines of the TensorRT backend: plan, build in a process of its own, check."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from builders.compile.build_call import EngineBuild, build_config_call, plan_build, runtime_section
from builders.compile.command_line import trtllm_build_command
from builders.compile.decisions import Decision, Subject
from builders.compile.engine_check import check_engine
from builders.compile.engine_job import EngineJob, JobReport, run_job
from builders.compile.subject import Compiled, read_subject
from builders.context import StepContext
from serve.artifacts.manifest import CACHES, MODEL, RUNTIME, BundleRuntime
from serve.engines.trtllm.call import ConstructorCall
from serve.engines.trtllm.explain import python_text
from serve.engines.trtllm.line import Installation, detect
from serve.engines.trtllm.model_directory import read_model_directory
from serve.engines.trtllm.orchestration import Orchestration, choose_orchestrator, engine_environ
from serve.engines.trtllm.settings import TrtllmSettings

TIMING_CACHE = "timing.cache"
# So much of the step's time limit is the engine's; the rest is for reading, checking and killing.
_SHARE = 0.95


def build(context: StepContext) -> dict[str, Any]:
    """Build the engine, as `builders.steps.compile` says."""
    installation = detect()
    compiled = read_subject(context)
    timing = _timing_cache(context, installation)
    subject = _subject(context, compiled, timing)
    planned = _plan(context, compiled, subject, installation)
    context.progress(0.02, 1.0, "planned")
    engine = context.output / MODEL
    job = EngineJob(
        "build",
        planned.plan.call,
        planned.plan.line.value,
        dict(planned.plan.environ),
        str(engine),
        compiled.settings.stop_timeout_s,
    )
    limit_s = context.spec.target.time_limit_s * _SHARE
    report = run_job(job, context.scratch / "build.log", limit_s, lambda stage: context.progress(0.05, 1.0, stage))
    section = runtime_section(subject)
    check_engine(engine, subject, report.version, TrtllmSettings.model_validate(section))
    kept = _keep_timing_cache(context, subject, engine, timing)
    runtime = BundleRuntime(engine=section)
    (context.output / RUNTIME).write_text(json.dumps(runtime.model_dump(mode="json"), indent=2) + "\n")
    context.progress(1.0, 1.0, "checked")
    return _result(context, planned, subject, report, kept)


def _subject(context: StepContext, compiled: Compiled, timing: Path | None) -> Subject:
    return Subject(
        sizes=compiled.sizes,
        settings=compiled.settings,
        compiled=context.spec.compile,
        layout=context.spec.parallel,
        dtype=compiled.dtype,
        algorithm=compiled.algorithm,
        kv_algorithm=compiled.kv_algorithm,
        experts=compiled.experts,
        timing_cache_in=str(timing) if timing is not None and timing.is_file() else None,
        timing_cache_out=str(context.scratch / TIMING_CACHE),
    )


def _plan(context: StepContext, compiled: Compiled, subject: Subject, installation: Installation) -> EngineBuild:
    layout = context.spec.parallel
    # An engine's ranks are on one node, and started by MPI. Whether that works is seen when it is tried.
    kind = choose_orchestrator(compiled.settings.orchestrator, layout, mpi_spawns=True, tensorrt=True)
    orchestration = Orchestration(kind, environ=engine_environ(kind, layout, os.environ))
    model = read_model_directory(context.weights)
    return plan_build(subject, model, orchestration, installation.line, installation.version)


def _timing_cache(context: StepContext, installation: Installation) -> Path | None:
    """Return the file of this GPU model and release: timings of another would be wrong."""
    directory = context.spec.compile.timing_cache
    if directory is None:
        return None
    gpu = context.node.gpus[0].name if context.node.gpus else "no-gpu"
    tensorrt = context.node.libraries.get("tensorrt", installation.version)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} {tensorrt}")
    return Path(directory).expanduser() / f"{name}.cache"


def _keep_timing_cache(context: StepContext, subject: Subject, engine: Path, shared: Path | None) -> bool:
    """Put the timing cache into the bundle, and where the next build finds it."""
    made = Path(subject.timing_cache_out)
    found = made if made.is_file() else engine / made.name  # by releases that take a name for one in the engine
    if not found.is_file():
        return False
    target = context.output / CACHES / TIMING_CACHE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(found, target)
    if shared is not None:
        shared.parent.mkdir(parents=True, exist_ok=True)
        partial = shared.with_name(f"{shared.name}.{os.getpid()}.partial")
        shutil.copyfile(target, partial)
        partial.replace(shared)  # at once: another build may read it
    return True


def _shown(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Return decisions without this node's paths."""
    return tuple(
        replace(decision, value=Path(decision.value).name)
        if decision.name.endswith("timing_cache") and decision.value
        else decision
        for decision in decisions
    )


def _result(
    context: StepContext, planned: EngineBuild, subject: Subject, report: JobReport, timing_cache: bool
) -> dict[str, Any]:
    engine = context.output / MODEL
    config, plugins = _shown(planned.config), _shown(planned.plugins)
    call = planned.plan.call
    keywords = {**call.keywords, "model": "CHECKPOINT", "build_config": build_config_call(config, plugins)}
    shown = replace(planned.plan, call=ConstructorCall(call.target, keywords), environ={})
    return {
        "line": planned.plan.line.value,
        "version": report.version,
        "python": sys.version.split()[0],
        "ranks": subject.layout.world_size,
        "sizes": {key: value for key, value in asdict(subject.sizes).items() if key != "reasons"},
        "reasons": subject.sizes.reasons,
        "decisions": {"BuildConfig": list(map(asdict, config)), "PluginConfig": list(map(asdict, plugins))},
        "call": f"{python_text(shown)}\nllm.save('ENGINE')",
        "command": trtllm_build_command(config, plugins, "CHECKPOINT", "ENGINE", subject.layout.world_size),
        "size_bytes": sum(path.stat().st_size for path in engine.rglob("*") if path.is_file()),
        "timing_cache": timing_cache,
        "parts_s": report.parts_s,
        "notes": [] if timing_cache else ["TensorRT-LLM left no timing cache: the next build takes as long."],
    }
