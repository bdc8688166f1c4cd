"""BundleSource: one bundle, pinned, and where gateways and replicas find it."""

from dataclasses import dataclass

from serve.artifacts.manifest import Manifest


@dataclass(frozen=True)
class BundleSource:
    """One bundle of a store, as it was found when the application was built.

    Attributes:
        store: URL of the store.
        name: Under which it was asked for.
        alias: That pointed to it, and may be rolled back; None: exactly this bundle was asked for, or `latest`.
        manifest: Of it; whoever has it needs the store for the files only.
    """

    store: str
    name: str
    alias: str | None
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Of the bundle."""
        return self.manifest.fingerprint

    def __str__(self) -> str:
        return f"{self.name}{'' if self.alias is None else f'@{self.alias}'} {self.fingerprint[:12]}"
