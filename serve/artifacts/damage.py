"""Damage: blobs of a store that are not what their name says."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from blake3 import blake3

from serve.artifacts.blobs import blob_key
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import Objects
from serve.artifacts.port import ByteProgress
from serve.artifacts.transfer_pools import transfer

_RANGE_BYTES = 8 << 20


@dataclass(frozen=True)
class DamagedFile:
    """A file whose content is missing or wrong in the store: its entry, and what is the matter."""

    entry: FileEntry
    reason: str


def find_damage(objects: Objects, files: Sequence[FileEntry], progress: ByteProgress) -> tuple[DamagedFile, ...]:
    """Read the contents of files in a store, all of them; return those that are missing or wrong, ordered by path."""
    contents = {entry.blake3: entry for entry in files}
    count = ByteCount(sum(entry.size_bytes for entry in contents.values()), progress)
    reasons: dict[str, str] = {}

    def read(entry: FileEntry, _ranges: Executor) -> None:
        if reason := _reason(objects, entry, count):
            reasons[entry.blake3] = reason

    transfer(read, contents.values())
    return tuple(DamagedFile(entry, reasons[entry.blake3]) for entry in files if entry.blake3 in reasons)


def _reason(objects: Objects, entry: FileEntry, count: ByteCount) -> str | None:
    key = blob_key(entry.blake3)
    size = objects.size(key)
    if size != entry.size_bytes:
        return "is missing" if size is None else f"has {size} bytes, the manifest says {entry.size_bytes}"
    hasher = blake3(max_threads=blake3.AUTO)
    for start in range(0, size, _RANGE_BYTES):
        data = objects.read_range(key, start, min(_RANGE_BYTES, size - start))
        hasher.update(data)
        count.add(len(data), entry.blake3)
    digest = hasher.hexdigest()
    return None if digest == entry.blake3 else f"has BLAKE3 {digest}, the manifest says {entry.blake3}"
