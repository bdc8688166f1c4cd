"""Checks of a bundle's directory: is it what its manifest says, file by file?"""

import os
from collections.abc import Sequence
from pathlib import Path

from serve.artifacts.bundle_layout import check_ranks
from serve.artifacts.cache_place import DATABASE, cache_root
from serve.artifacts.digests import DigestCache
from serve.artifacts.file_scan import scan_directory
from serve.artifacts.manifest import MANIFEST, FileEntry, Manifest
from serve.artifacts.parsing import parse_manifest
from serve.artifacts.port import ByteProgress, no_progress
from serve.errors import BundleCorrupt

# So many files are named in one message.
_NAMED = 10


def verify_directory(
    directory: Path,
    *,
    digests: DigestCache | None = None,
    only: Sequence[str] | None = None,
    progress: ByteProgress = no_progress,
) -> Manifest:
    """Check every file of a bundle's directory against its manifest.

    Args:
        directory: Of the bundle.
        digests: What was read before and did not change is not read again; None: all is read.
        only: See `selected`; None: all files have to be there.
        progress: Told of bytes hashed.

    Returns:
        The manifest.

    Raises:
        BundleCorrupt: It has no manifest, or a file is missing, changed, cut short, not in the manifest, or no plain
            file; or an engine of the layout is missing. Names each file, and both sides.
    """
    manifest = read_manifest(directory)
    check_ranks(manifest)
    found = {file.relative: file for file in scan_directory(directory) if file.relative != MANIFEST}
    expected = {entry.path: entry for entry in selected(manifest.files, only)}
    wrong = [f"{path} is missing" for path in expected if path not in found]
    wrong += [f"{path} is not in the manifest" for path in found if path not in expected]
    same_size = []
    for path in expected.keys() & found.keys():
        size, wanted = found[path].size_bytes, expected[path].size_bytes
        if size == wanted:
            same_size.append(path)
        else:
            wrong.append(f"{path} has {size} bytes, the manifest says {wanted}")
    if not wrong:
        read = (digests or DigestCache()).digests([found[path].path for path in same_size], progress)
        for path in same_size:
            digest, wanted_digest = read[found[path].path], expected[path].blake3
            if digest != wanted_digest:
                wrong.append(f"{path} has BLAKE3 {digest}, the manifest says {wanted_digest}")
    if wrong:
        raise BundleCorrupt(describe_wrong(directory, manifest, wrong))
    return manifest


def check_bundle(directory: Path, *, only: Sequence[str] | None = None) -> Manifest:
    """Check a bundle before it is loaded: fast if nothing changed since it was checked last, and otherwise as thorough.

    Raises:
        BundleCorrupt: See `verify_directory`.
    """
    root = directory.absolute().parent.parent
    database = (root if (root / DATABASE).exists() else cache_root()) / DATABASE
    cache = DigestCache(database)
    try:
        return verify_directory(directory, digests=cache, only=only)
    finally:
        cache.close()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a bundle's directory.

    Raises:
        BundleCorrupt: There is none, or it is no manifest.
    """
    path = directory / MANIFEST
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            data = file.read()
    except OSError as exc:
        raise BundleCorrupt(f"{path} cannot be read: {exc.strerror}; {directory} is no bundle") from exc
    return parse_manifest(data, str(path))


def selected(files: Sequence[FileEntry], only: Sequence[str] | None) -> tuple[FileEntry, ...]:
    """Return the files at or below some paths, for instance `tokenizer` and `runtime.json`; None: all of them."""
    if only is None:
        return tuple(files)
    places = [place.rstrip("/") for place in only]
    return tuple(
        entry for entry in files if any(entry.path == place or entry.path.startswith(f"{place}/") for place in places)
    )


def describe_wrong(directory: Path, manifest: Manifest, wrong: Sequence[str]) -> str:
    """Return the message about a directory that is not what its manifest says."""
    more = [f"and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
    lines = "\n".join(f"  {line}" for line in (*sorted(wrong)[:_NAMED], *more))
    return (
        f"{directory} is not the bundle {manifest.fingerprint[:12]} ({manifest.name}) that its manifest describes:\n"
        f"{lines}\nRemove the directory, and fetch or build the bundle again"
    )
