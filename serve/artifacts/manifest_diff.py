"""What differs between two bundles, by their manifests. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve.artifacts.manifest import Manifest

# Differ between any two publications, and say nothing.
_ALWAYS = {"provenance.created"}


@dataclass(frozen=True)
class Difference:
    """One difference: where, and both sides; None: that side does not have it."""

    key: str
    left: Any
    right: Any


def compare(left: Manifest, right: Manifest) -> tuple[Difference, ...]:
    """Return the differences of two manifests, in the order in which manifests have them, then those of files."""
    sides = [dict(_flat("", manifest.model_dump(mode="json", exclude={"files"}))) for manifest in (left, right)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    fields = [Difference(key, sides[0].get(key), sides[1].get(key)) for key in keys if key not in _ALWAYS]
    return tuple(item for item in (*fields, *_files(left, right)) if item.left != item.right)


def _files(left: Manifest, right: Manifest) -> Iterator[Difference]:
    sides = [{entry.path: entry for entry in manifest.files} for manifest in (left, right)]
    for path in sorted(sides[0].keys() | sides[1].keys()):
        entries = [side.get(path) for side in sides]
        digests = [entry.blake3 if entry else None for entry in entries]
        if digests[0] != digests[1]:
            texts = [f"{entry.size_bytes} bytes, {entry.blake3[:12]}" if entry else None for entry in entries]
            yield Difference(f"files.{path}", *texts)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value
