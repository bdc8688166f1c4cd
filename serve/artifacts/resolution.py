"""Resolution: from a reference to a manifest, or to a message that says what there is instead."""

from collections.abc import Mapping
from typing import Protocol

from serve.artifacts.manifest import Manifest
from serve.artifacts.port import AliasMove, Version
from serve.artifacts.reference import DEFAULT_ALIAS, BundleReference
from serve.errors import ConfigError


class Readable(Protocol):
    """What resolving asks of a store."""

    @property
    def url(self) -> str:
        """Where it is."""

    def bundles(self) -> tuple[str, ...]:
        """Return the fingerprints of all bundles."""

    def find_bundle(self, fingerprint: str) -> Manifest | None:
        """Return a manifest; None: there is none."""

    def names(self) -> tuple[str, ...]:
        """Return the names that have versions."""

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return the versions of a name, oldest first."""

    def aliases(self, name: str) -> Mapping[str, AliasMove]:
        """Return where the aliases of a name point."""


def resolve(store: Readable, reference: BundleReference) -> Manifest:
    """Find the bundle that a reference means.

    Raises:
        ConfigError: There is no such name, version, alias or fingerprint, or its bundle was removed.
    """
    fingerprint = _fingerprint(store, reference)
    manifest = store.find_bundle(fingerprint)
    if manifest is None:
        raise ConfigError(
            f"{reference}: its bundle {fingerprint[:12]} is not in the store any more, a collection removed it; "
            f"{_there(store, reference.name)}"
        )
    return manifest


def _fingerprint(store: Readable, reference: BundleReference) -> str:
    versions = store.versions(reference.name)
    if reference.fingerprint is not None:
        return _by_prefix(store, reference, versions)
    if not versions:
        names = ", ".join(store.names()) or "no bundles"
        raise ConfigError(f"{reference}: {store.url} has no bundle named {reference.name!r}; it has: {names}")
    if reference.version is not None:
        found = [version.fingerprint for version in versions if version.number == reference.version]
    elif reference.selector == DEFAULT_ALIAS:
        found = [versions[-1].fingerprint]
    else:
        move = store.aliases(reference.name).get(reference.selector)
        found = [move.fingerprint] if move is not None else []
    if not found:
        what = "version" if reference.version is not None else "alias"
        raise ConfigError(
            f"{reference}: {reference.name} has no {what} {reference.selector!r}; {_there(store, reference.name)}"
        )
    return found[0]


def _by_prefix(store: Readable, reference: BundleReference, versions: tuple[Version, ...]) -> str:
    prefix = reference.fingerprint or ""
    named = {version.fingerprint for version in versions if version.fingerprint.startswith(prefix)}
    found = sorted(named or {fingerprint for fingerprint in store.bundles() if fingerprint.startswith(prefix)})
    if len(found) > 1:
        raise ConfigError(f"{reference}: several bundles begin like this: {', '.join(found)}; write more digits")
    if not found:
        raise ConfigError(
            f"{reference}: {store.url} has no bundle with this fingerprint; {_there(store, reference.name)}"
        )
    return found[0]


def _there(store: Readable, name: str) -> str:
    versions = ", ".join(f"{version.number} ({version.fingerprint[:12]})" for version in store.versions(name))
    aliases = ", ".join(f"{alias} ({move.fingerprint[:12]})" for alias, move in store.aliases(name).items())
    return f"versions of {name}: {versions or 'none'}; aliases: {aliases or 'none'}"
