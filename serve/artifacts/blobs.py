"""Blobs: file contents under their digest, each once."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve.artifacts.byte_count import ByteCount
from serve.artifacts.file_state import FileState
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import Objects

BLOBS = "blobs"
# Network storage answers slowly, and many questions at a time.
_THREADS = 8


def blob_key(digest: str) -> str:
    """Return where a content is kept."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def missing_blobs(objects: Objects, files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
    """Return the files, one of each content, whose blob is not there with the right size."""
    contents = {entry.blake3: entry for entry in files}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="blob") as pool:
        sizes = pool.map(lambda entry: objects.size(blob_key(entry.blake3)), contents.values())
        return tuple(entry for entry, size in zip(contents.values(), sizes, strict=True) if size != entry.size_bytes)


def upload_blobs(
    objects: Objects,
    files: Sequence[FileEntry],
    directory: Path,
    states: Mapping[str, FileState],
    count: ByteCount,
) -> None:
    """Store the contents of files.

    Args:
        objects: Of the store.
        files: To store.
        directory: That their paths are relative to.
        states: Of each path, when its digest was computed.
        count: Told of each file.

    Raises:
        BundleCorrupt: A file is not what it was when its digest was computed.
    """

    def upload(entry: FileEntry) -> None:
        objects.upload(directory / entry.path, blob_key(entry.blake3), states[entry.path])
        count.add(entry.size_bytes)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="upload") as pool:
        for _ in pool.map(upload, files):
            pass
