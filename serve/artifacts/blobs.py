"""Blobs: file contents under their digest, each once."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from serve.artifacts.file_state import FileState
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import Objects, sizes_of
from serve.artifacts.transfer_pools import transfer

BLOBS = "blobs"


def blob_key(digest: str) -> str:
    """Return where a content is kept."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def missing_blobs(objects: Objects, files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """Return the files, one of each content, whose blob is not there with the right size."""
    contents = {blob_key(entry.blake3): entry for entry in files}
    sizes = sizes_of(objects, list(contents))
    return tuple(entry for key, entry in contents.items() if sizes[key] != entry.size_bytes)


def upload_blobs(
    objects: Objects, files: Sequence[FileEntry], directory: Path, states: Mapping[str, FileState]
) -> None:
    """Store the contents of files.

    Args:
        objects: Of the store.
        files: To store.
        directory: That their paths are relative to.
        states: Of each path, when its digest was computed.

    Raises:
        BundleCorrupt: A file is not what it was when its digest was computed.
    """

    def upload(entry: FileEntry, _ranges: Executor) -> None:
        objects.upload(directory / entry.path, blob_key(entry.blake3), states[entry.path])

    transfer(upload, files)
