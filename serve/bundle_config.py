"""What a model's configuration is once its bundle is known. Pure.

What the configuration says comes before the bundle's tuned settings, and these before the defaults.
"""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import TOKENIZER, BundleKind, BundleRuntime, Manifest
from serve.config import ModelConfig
from serve.core.parallel import ParallelLayout
from serve.core.strict_model import describe_mistakes
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

_BACKENDS = {BundleKind.TENSORRT_ENGINE: "tensorrt", BundleKind.TRTLLM_CHECKPOINT: "pytorch"}


def fit_bundle(model: ModelConfig, bundle: BundleSource, runtime: BundleRuntime) -> ModelConfig:
    """Return the configuration with what the bundle brings: engine, layout, and its tuned settings.

    Args:
        model: As the operator wrote it.
        bundle: Which is served.
        runtime: Its tuned settings.

    Raises:
        ConfigError: The configuration asks for what the bundle is not; names both.
    """
    manifest, said = bundle.manifest, model.model_fields_set
    sections: dict[str, Any] = {
        "engine": _engine(model, bundle, runtime),
        "parallel": _parallel(model, bundle) if "parallel" in said else manifest.parallel,
    }
    if model.autoscaling is not None and runtime.replica_requests is not None:
        sections["autoscaling"] = {"target_ongoing_requests": float(runtime.replica_requests)} | (
            model.autoscaling.model_dump(exclude_unset=True)
        )
    if model.fallback is not None and manifest.kind.engine == "transformers":
        logger.info("models[%s].fallback is not needed: bundle %s is served by that engine.", model.id, bundle)
        sections["fallback"] = None
    try:
        return ModelConfig.model_validate(model.model_dump(exclude_unset=True) | sections)
    except ValidationError as exc:
        mistakes = describe_mistakes(exc, f"models[{model.id}]")
        raise ConfigError(f"with the tuned settings of bundle {bundle}: {mistakes}") from None


def same_tokenizer(one: Manifest, other: Manifest) -> bool:
    """Return whether the gateway's tokens mean the same to two bundles."""
    return _tokenizer_files(one) == _tokenizer_files(other)


def merge_settings(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which those of `first` come before those of `then`, section by section.

    A section of another `kind` takes the place of the whole section.
    """
    merged = dict(then)
    for key, value in first.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and _same_kind(value, below):
            merged[key] = merge_settings(value, below)
        else:
            merged[key] = value
    return merged


def _same_kind(first: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return bool(first.get("kind", then.get("kind")) == then.get("kind"))


def _engine(model: ModelConfig, bundle: BundleSource, runtime: BundleRuntime) -> dict[str, Any]:
    manifest = bundle.manifest
    kind = manifest.kind.engine
    asked = model.engine.model_dump(exclude_unset=True) if "engine" in model.model_fields_set else {}
    if manifest.provenance.replaces is not None and model.fallback is not None and kind == model.fallback.kind:
        # The build has fallen back, and this model may.
        logger.warning("%s: bundle %s stands in for another: %s", model.id, bundle, manifest.provenance.replaces)
        asked = model.fallback.model_dump(exclude_unset=True)
    elif asked and model.engine.kind != kind:
        raise ConfigError(
            f"models[{model.id}].engine: {model.engine.kind} does not load bundle {bundle}, a {manifest.kind.value} "
            f"for engine {kind}; remove `engine`, or choose a bundle for {model.engine.kind}"
        )
    if runtime.engine.get("trust_remote_code") and not asked.get("trust_remote_code"):
        raise ConfigError(
            f"models[{model.id}].engine: bundle {bundle} runs Python code that comes with its checkpoint; if you trust "
            f"it, say so here: engine: {{kind: {kind}, trust_remote_code: true}}"
        )
    engine = merge_settings(asked, {**runtime.engine, "kind": kind}) | {"kind": kind}
    backend = _BACKENDS.get(manifest.kind)
    if backend is not None:
        if engine.get("backend", "auto") not in ("auto", backend):
            raise ConfigError(
                f"models[{model.id}].engine.backend: {engine['backend']} does not load bundle {bundle}, a "
                f"{manifest.kind.value} for backend {backend}; remove `backend`"
            )
        engine["backend"] = backend
    return engine


def _parallel(model: ModelConfig, bundle: BundleSource) -> ParallelLayout:
    asked, built = model.parallel, bundle.manifest.parallel
    fixed = ("tensor", "pipeline", "expert")
    if bundle.manifest.kind is BundleKind.TENSORRT_ENGINE and any(
        getattr(asked, name) != getattr(built, name) for name in fixed
    ):
        both = [", ".join(f"{name}={getattr(layout, name)}" for name in fixed) for layout in (asked, built)]
        raise ConfigError(
            f"models[{model.id}].parallel: {both[0]} is asked for, and bundle {bundle} was compiled for {both[1]}, "
            "which cannot be changed; remove `parallel`, or build the bundle for that layout"
        )
    return asked


def _tokenizer_files(manifest: Manifest) -> dict[str, str]:
    # config.json is there for the context's length; how weights are quantized stands in it, too.
    return {
        entry.path: entry.blake3
        for entry in manifest.files
        if entry.path.startswith(f"{TOKENIZER}/") and entry.path != f"{TOKENIZER}/config.json"
    }
