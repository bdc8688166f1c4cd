"""From a model's configuration to the bundle that it means, and what would serve if that one failed."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from serve.artifacts.alias_history import bundle_before
from serve.artifacts.bundle_layout import check_ranks
from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import RUNTIME, TOKENIZER, BundleKind, BundleRuntime, Manifest
from serve.artifacts.port import ArtifactStore
from serve.artifacts.reference import DEFAULT_ALIAS, BundleReference
from serve.bundle_config import fit_bundle, same_tokenizer
from serve.config import ModelConfig
from serve.engines.transformers.head_check import check_heads
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable

logger = logging.getLogger(__name__)

OpenStore = Callable[[str], ArtifactStore]
_READ_HERE = (RUNTIME, f"{TOKENIZER}/config.json")


@dataclass(frozen=True)
class ResolvedModel:
    """A model of which everything is known.

    Attributes:
        config: With what the bundle brings.
        bundle: What is served; None: a checkpoint, where the configuration says.
        before: What serves if that bundle does not work; None: there is nothing, or it would not fit.
    """

    config: ModelConfig
    bundle: BundleSource | None = None
    before: "ResolvedModel | None" = None

    @property
    def stands_in(self) -> bool:
        """Whether the build of the bundle has put it in the place of what was wanted."""
        return self.bundle is not None and self.bundle.manifest.provenance.replaces is not None


def resolve_model(model: ModelConfig, open_store: OpenStore) -> ResolvedModel:
    """Find the bundle of a model. Blocks for as long as the store takes.

    Args:
        model: As the operator wrote it.
        open_store: Opens a store by its URL.

    Raises:
        ConfigError: There is no such store, name or alias, or the configuration does not fit the bundle.
    """
    reference = model.reference
    if reference is None:
        return ResolvedModel(model)
    try:
        store = open_store(reference.store)
        bundle = _find(store, reference, model.bundle_fingerprint)
        found = _resolve(model, bundle, store)
        if bundle.alias is None:
            return found
        return replace(found, before=_before(model, bundle, store))
    except (BundleCorrupt, StoreUnavailable, ConfigError) as exc:
        message = str(exc)
        prefix = "" if message.startswith("models[") else f"models[{model.id}].bundle: "
        raise ConfigError(f"{prefix}{message}") from exc


def fallback_checkpoint(model: ModelConfig, manifest: Manifest) -> Path | None:
    """Return the checkpoint that the transformers engine loads in the place of a bundle; None: the bundle's own.

    Raises:
        ConfigError: There is none that it could load, or it is not there.
    """
    if model.fallback_model is not None:
        found = model.model_copy(update={"bundle": None, "model": model.fallback_model}).directory
        if not (found / "config.json").is_file():
            raise ConfigError(
                f"models[{model.id}].fallback_model: {found} has no config.json; give a checkpoint's path"
            )
        return found
    if manifest.kind is BundleKind.TRTLLM_CHECKPOINT and manifest.quantization.recipe == "none":
        return None
    source = model.model_copy(update={"bundle": None, "model": manifest.model.source}).directory
    if (source / "config.json").is_file():
        return source
    raise ConfigError(
        f"models[{model.id}].fallback: bundle {manifest.name} ({manifest.kind.value}, recipe "
        f"{manifest.quantization.recipe}) cannot be loaded by transformers, and {manifest.model.source}, which it was "
        "made of, is not on this machine; set fallback_model to a checkpoint, or remove `fallback`"
    )


def _find(store: ArtifactStore, reference: BundleReference, fingerprint: str | None) -> BundleSource:
    pinned = reference if fingerprint is None else reference.pinned(fingerprint)
    manifest = store.resolve(pinned)
    movable = reference.version is None and reference.fingerprint is None and reference.selector != DEFAULT_ALIAS
    return BundleSource(store.url, reference.name, reference.selector if movable else None, manifest)


def _resolve(model: ModelConfig, bundle: BundleSource, store: ArtifactStore) -> ResolvedModel:
    check_ranks(bundle.manifest)
    with tempfile.TemporaryDirectory(prefix="raytrt-") as name:
        directory = Path(name)
        wanted = [entry for entry in bundle.manifest.files if entry.path in _READ_HERE]
        store.materialize(wanted, directory)
        config = fit_bundle(model, bundle, _read_runtime(directory / RUNTIME))
        try:
            if config.engine.kind == "transformers":
                check_heads(directory / TOKENIZER, config.parallel.tensor)
            if config.fallback is not None:
                check_heads(directory / TOKENIZER, config.parallel.world_size, "fallback")
        except ConfigError as exc:
            raise ConfigError(f"models[{model.id}].{exc}") from None
    return ResolvedModel(config, bundle)


def _read_runtime(path: Path) -> BundleRuntime:
    try:
        return BundleRuntime.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return BundleRuntime()
    except ValidationError as exc:
        raise BundleCorrupt(f"{RUNTIME} of the bundle cannot be read: {exc}") from None


def _before(model: ModelConfig, bundle: BundleSource, store: ArtifactStore) -> ResolvedModel | None:
    """Return what the alias pointed to before, if that could take over from the bundle."""
    assert bundle.alias is not None
    fingerprint = bundle_before(store.history(bundle.name, bundle.alias), bundle.fingerprint)
    if fingerprint is None:
        return None
    try:
        manifest = store.find_bundle(fingerprint)
        if manifest is None:
            raise BundleCorrupt("it was removed from the store")
        if not same_tokenizer(manifest, bundle.manifest):
            raise ConfigError("it has another tokenizer than the gateway")
        return _resolve(model, replace(bundle, manifest=manifest), store)
    except (BundleCorrupt, ConfigError) as exc:
        logger.warning(
            "%s: if bundle %s does not start, %s cannot take over in its replicas: %s",
            model.id,
            bundle,
            fingerprint[:12],
            exc,
        )
        return None
