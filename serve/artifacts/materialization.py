"""Materialization: files of a store in a directory of this node."""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from serve.artifacts.byte_count import ByteCount
from serve.artifacts.digests import hash_file
from serve.artifacts.download import download_blob, remove_partial
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import Objects
from serve.artifacts.port import ByteProgress
from serve.artifacts.transfer_pools import transfer
from serve.errors import BundleCorrupt


def materialize(objects: Objects, files: Sequence[FileEntry], directory: Path, progress: ByteProgress) -> None:
    """Write files into a directory, each checked. Files that are there and right are kept, others replaced.

    Raises:
        BundleCorrupt: A blob is missing, too short or too long, or has another digest; or a symbolic link leads out of
            the directory.
    """
    count = ByteCount(sum(entry.size_bytes for entry in files), progress)
    directory.mkdir(parents=True, exist_ok=True)
    root = directory.resolve()

    def bring(entry: FileEntry, ranges: Executor) -> None:
        target = directory / entry.path
        if not target.parent.resolve().is_relative_to(root):
            raise BundleCorrupt(f"{target.parent} leads out of {directory} by a symbolic link; remove the link")
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_right(target, entry):
            remove_partial(target)  # of a process that was killed at its last step
            count.set(entry.size_bytes, entry.path)
            return
        target.unlink(missing_ok=True)
        try:
            download_blob(objects, entry, target, ranges, count)
        except BundleCorrupt as exc:
            if entry.path == entry.blake3:  # who asks for a blob by its digest knows its file, and names it
                raise
            raise BundleCorrupt(f"{entry.path}: {exc}") from exc

    transfer(bring, files)


def _is_right(path: Path, entry: FileEntry) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size_bytes:
        return False
    return hash_file(path) == entry.blake3
