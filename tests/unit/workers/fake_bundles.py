"""Bundles without a store: what a start asks of them, answered from memory."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from serve.artifacts.bundle_source import BundleSource
from serve.artifacts.manifest import Manifest
from serve.workers.launch import EngineLaunch


def manifest_of(digit: str, **changes: Any) -> Manifest:
    """Return the manifest of a small bundle whose fingerprint is one digit, again and again."""
    return Manifest.model_validate(
        {
            "fingerprint": digit * 64,
            "name": "tiny",
            "kind": "transformers-checkpoint",
            "model": {"source": "builtin:quickstart", "digest": "0" * 64, "architecture": "LlamaForCausalLM"},
            "provenance": {"created": "2026-01-01T00:00:00Z", "raytrt": "0.1"},
            "files": [{"path": "model/config.json", "size_bytes": 2, "blake3": "0" * 64}],
        }
        | changes
    )


def source_of(digit: str, alias: str | None = "prod", **changes: Any) -> BundleSource:
    """Return such a bundle, found by an alias."""
    return BundleSource("/store", "tiny", alias, manifest_of(digit, **changes))


class FakeBundles:
    """BundleAccess of one deployment; several replicas may share it.

    Args:
        directory: Holds a directory for each bundle, by its fingerprint.
    """

    def __init__(self, directory: Path) -> None:
        self.said: list[str] = []
        self.refused: dict[str, Exception] = {}
        self.history: list[tuple[str, str]] = []
        self.failures: Counter[str] = Counter()
        self.prepared: list[str] = []
        self.worked: set[str] = set()
        self._directory = directory
        self._own: Counter[str] = Counter()

    def say(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)

    async def rejected(self, bundle: BundleSource) -> Collection[str]:
        """Return what was rejected."""
        return {fingerprint for fingerprint, _ in self.history}

    async def prepare(self, launch: EngineLaunch) -> Path:
        """Return the bundle's directory, or refuse it."""
        assert launch.bundle is not None
        self.prepared.append(launch.bundle.fingerprint)
        if launch.bundle.fingerprint in self.refused:
            raise self.refused[launch.bundle.fingerprint]
        return self._directory / launch.bundle.fingerprint

    async def failed_elsewhere(self, bundle: BundleSource) -> int:
        """Return how many replicas but the last one failed."""
        return self.failures[bundle.fingerprint] - 1

    async def note_failure(self, bundle: BundleSource) -> None:
        """Count it."""
        self.failures[bundle.fingerprint] += 1

    async def note_success(self, bundle: BundleSource) -> None:
        """Keep it, and forget failures."""
        self.worked.add(bundle.fingerprint)
        self.failures.pop(bundle.fingerprint, None)

    async def has_worked(self, bundle: BundleSource) -> bool:
        """Return whether it was kept."""
        return bundle.fingerprint in self.worked

    async def reject(self, bundle: BundleSource, reason: str) -> None:
        """Keep it."""
        self.history.append((bundle.fingerprint, reason))
