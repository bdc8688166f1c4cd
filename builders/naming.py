"""What names and aliases point to after a build."""

from dataclasses import dataclass

from builders.spec import BuildSpec
from serve.artifacts.manifest import Manifest
from serve.artifacts.port import ArtifactStore


@dataclass(frozen=True)
class Naming:
    """Where a bundle can be found.

    Attributes:
        version: Of the name.
        aliases: Those of the specification that point to it now.
        left: Those that point elsewhere, and were left there.
    """

    version: int
    aliases: tuple[str, ...]
    left: tuple[str, ...]


def name_bundle(store: ArtifactStore, spec: BuildSpec, manifest: Manifest, replaces: str | None = None) -> Naming:
    """Add a version of the specification's name, and point its aliases to it.

    An alias that has pointed to the bundle before stays where somebody moved it since: a build that is repeated does
    not undo a rollback. Nor does a fallback move it: what it points to now was built as it should be. A repeated build
    adds no version.

    Args:
        store: Of the bundle.
        spec: Of the build.
        manifest: Of the bundle.
        replaces: Why it is a fallback; None: it is none.
    """
    known = (version for version in store.versions(spec.name) if version.fingerprint == manifest.fingerprint)
    note = f"fallback: {replaces}" if replaces else ""
    version = next(known, None) or store.add_version(spec.name, manifest.fingerprint, note)
    before = store.aliases(spec.name)
    here, left = [], []
    for alias in spec.aliases:
        history = [move.fingerprint for move in store.history(spec.name, alias)] if alias in before else []
        if history and history[-1] == manifest.fingerprint:
            here.append(alias)
        elif not history or (manifest.fingerprint not in history and replaces is None):
            store.move_alias(spec.name, alias, manifest.fingerprint, reason=f"build of version {version.number}")
            here.append(alias)
        else:
            left.append(alias)
    return Naming(version.number, tuple(here), tuple(left))
