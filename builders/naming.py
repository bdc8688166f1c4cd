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

    An alias that exists is moved by a new version only: a build that is repeated does not undo a rollback. And not by a
    fallback: what the alias points to now was built as it should be.

    Args:
        store: Of the bundle.
        spec: Of the build.
        manifest: Of the bundle.
        replaces: Why it is a fallback; None: it is none.
    """
    versions = store.versions(spec.name)
    is_new = not versions or versions[-1].fingerprint != manifest.fingerprint
    version = store.add_version(spec.name, manifest.fingerprint, f"fallback: {replaces}" if replaces else "")
    before = store.aliases(spec.name)
    here, left = [], []
    for alias in spec.aliases:
        if alias in before and before[alias].fingerprint == manifest.fingerprint:
            here.append(alias)
        elif alias not in before or (is_new and replaces is None):
            store.move_alias(spec.name, alias, manifest.fingerprint, reason=f"build of version {version.number}")
            here.append(alias)
        else:
            left.append(alias)
    return Naming(version.number, tuple(here), tuple(left))
