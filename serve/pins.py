"""Pins: aliases of a config file replaced by what they point to now.

Serve compares the text of a configuration, and does nothing for one that it has. A moved alias does not change the
text; the fingerprint that it points to does.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import Manifest
from serve.artifacts.reference import BundleReference
from serve.bundle_models import OpenStore, ResolvedModel, resolve_model
from serve.config import IMPORT_PATH, AppConfig
from serve.workers.download_text import size_text


@dataclass(frozen=True)
class Pin:
    """What one model's bundle is now.

    Attributes:
        app: Name of the application.
        model_id: Of the model.
        resolved: The model, with its bundle.
    """

    app: str
    model_id: str
    resolved: ResolvedModel

    @property
    def bundle(self) -> BundleSource:
        """The bundle."""
        assert self.resolved.bundle is not None, "only models with a bundle are pinned"
        return self.resolved.bundle

    def __str__(self) -> str:
        return f"{self.model_id}: {describe_bundle(self.bundle)}"


def find_pins(applications: Mapping[str, AppConfig], open_store: OpenStore) -> tuple[Pin, ...]:
    """Find the bundles of all models that have one. Blocks for as long as the stores take.

    Raises:
        ConfigError: There is no such store, name or alias, or a configuration does not fit its bundle.
    """
    return tuple(
        Pin(name, model.id, resolve_model(model, open_store))
        for name, config in applications.items()
        for model in config.models
        if model.bundle is not None
    )


def pin_document(document: Mapping[str, Any], pins: tuple[Pin, ...]) -> dict[str, Any]:
    """Return a config file's content with the fingerprint of every bundle; paths of stores are made absolute.

    Args:
        document: The parsed file, which is left as it is.
        pins: Of its applications.
    """
    found = {(pin.app, pin.model_id): pin for pin in pins}
    pinned = copy.deepcopy(dict(document))
    for application in pinned["applications"]:
        if application.get("import_path") != IMPORT_PATH:
            continue
        for model in (application.get("args") or {}).get("models", ()):
            pin = found.get((str(application.get("name", "default")), model["id"]))
            if pin is not None:
                reference = pin.resolved.config.reference
                assert reference is not None
                model["bundle"] = str(_absolute(reference))
                model["bundle_fingerprint"] = pin.bundle.fingerprint
    return pinned


def describe_bundle(bundle: BundleSource) -> str:
    """Return a bundle for people: what it is, and the key figures of its certificates."""
    manifest = bundle.manifest
    recipe = manifest.quantization.recipe
    what = [manifest.kind.value, *([recipe] if recipe != "none" else []), size_text(manifest.size_bytes)]
    return f"bundle {bundle}: {', '.join(what)}; {_figures(manifest)}"


def _figures(manifest: Manifest) -> str:
    certificates = manifest.certificates
    figures = [
        ("accuracy drop {:.2%}", certificates.accuracy_drop),
        ("greedy agreement {:.1%}", certificates.greedy_agreement),
        ("perplexity x {:.3f}", certificates.perplexity_ratio),
        ("{:.0f} tokens/s", certificates.output_tokens_per_s),
        ("TTFT p95 {:.3f} s", certificates.ttft_p95_s),
        ("TPOT p95 {:.4f} s", certificates.tpot_p95_s),
    ]
    return ", ".join(text.format(value) for text, value in figures if value is not None) or "no certificates"


def _absolute(reference: BundleReference) -> BundleReference:
    store = reference.store
    if "://" in store or store.startswith("~"):
        return reference
    return BundleReference(str(Path(store).absolute()), reference.name, reference.selector)
