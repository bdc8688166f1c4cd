"""The steps of a build: which there are, what each needs, and what each may see of the specification. PURE.

What a step may see is what its fingerprint covers (`graph`), and no more: another part has its default.
"""

from collections.abc import Mapping
from typing import Any

from builders.context import StepName
from builders.quantize.recipes import export_format
from builders.source.location import without_password
from builders.spec import BuildSpec
from serve.artifacts.manifest import BundleKind

# Parts of the specification that shape a step's output, by dotted name.
_SPEC_PARTS: Mapping[StepName, tuple[str, ...]] = {
    StepName.FETCH: (),
    StepName.REFERENCE: (
        "kind",
        "parallel",
        "engine",
        "verify.texts",
        "verify.output_tokens",
        "verify.tasks",
        "verify.reference_engine",
        "verify.reference_device",
    ),
    StepName.QUANTIZE: ("kind", "quantize", "engine.trust_remote_code"),
    StepName.COMPILE: ("kind", "parallel", "engine", "compile", "tune"),
    StepName.TUNE: ("kind", "parallel", "engine", "tune"),
    StepName.VERIFY: ("kind", "parallel", "engine", "verify", "tune"),
    StepName.PUBLISH: ("kind", "parallel"),
}
# What a step may read besides: names that it writes into reports, and how it runs.
_LABELS = ("name", "store", "source", "target", "aliases", "fallback")


def step_needs(spec: BuildSpec) -> Mapping[StepName, tuple[StepName, ...]]:
    """Return the steps of a build, in order, and what each needs."""
    model = [StepName.FETCH]
    if spec.quantize.recipe != "none" or spec.quantize.kv_cache != "auto":
        model.append(StepName.QUANTIZE)
    steps: dict[StepName, tuple[StepName, ...]] = {StepName.FETCH: (), StepName.REFERENCE: (StepName.FETCH,)}
    if StepName.QUANTIZE in model:
        steps[StepName.QUANTIZE] = (StepName.FETCH,)
    if spec.kind is not BundleKind.TRANSFORMERS_CHECKPOINT:
        steps[StepName.COMPILE] = tuple(model)
        model.append(StepName.COMPILE)
    steps[StepName.TUNE] = tuple(model)
    steps[StepName.VERIFY] = (*model, StepName.REFERENCE, StepName.TUNE)
    steps[StepName.PUBLISH] = (*model, StepName.TUNE, StepName.VERIFY)
    return steps


def spec_parts(spec: BuildSpec, step: StepName) -> tuple[str, ...]:
    """Return the parts of the specification that shape a step's output, by dotted name."""
    parts = _SPEC_PARTS[step]
    if step is StepName.QUANTIZE and export_format(spec.quantize, spec.kind) == "tensorrt-llm":
        return (*parts, "parallel")  # that format has a file a rank; others are cut when they are loaded
    return parts


def visible_spec(spec: BuildSpec, step: StepName) -> BuildSpec:
    """Return the specification as a step sees it.

    What its fingerprint does not cover has its default. Secrets are left out: what steps see ends up in reports.
    """
    if step is StepName.FETCH:
        return spec  # what it takes is in the source's digest
    spec = _without_secrets(spec)
    if step is StepName.PUBLISH:
        return spec  # what it quotes is covered by the other steps' fingerprints
    shown: dict[str, Any] = {}
    full = spec.model_dump(mode="json")
    for part in (*_LABELS, *spec_parts(spec, step)):
        if (value := spec_part(full, part)) is not None:
            _put(shown, part, value)
    return BuildSpec.model_validate(shown)


def _without_secrets(spec: BuildSpec) -> BuildSpec:
    source = spec.source.model_copy(update={"location": without_password(spec.source.location)})
    target = spec.target
    if target.engine_env is not None:
        target = target.model_copy(update={"engine_env": target.engine_env.model_copy(update={"env_vars": {}})})
    return spec.model_copy(update={"source": source, "target": target, "store": without_password(spec.store)})


def files_of(spec: BuildSpec, step: StepName) -> tuple[str, ...]:
    """Return the user's files that a step reads, as the specification names them."""
    files = {
        StepName.REFERENCE: [spec.verify.texts.file, *(task.file for task in spec.verify.tasks)],
        StepName.QUANTIZE: [spec.quantize.calibration.file],
        StepName.VERIFY: [spec.verify.texts.file, *(task.file for task in spec.verify.tasks)],
    }
    return tuple(dict.fromkeys(file for file in files.get(step, []) if file is not None))


def spec_part(document: Mapping[str, Any], part: str) -> Any:
    """Return a part of a specification as JSON, by its dotted name; None: it is not there."""
    value: Any = document
    for key in part.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None  # the engine's section has what was written
    return value


def _put(document: dict[str, Any], part: str, value: Any) -> None:
    *path, last = part.split(".")
    for key in path:
        document = document.setdefault(key, {})
    document[last] = value
