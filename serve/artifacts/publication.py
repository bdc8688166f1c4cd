"""Publication: first the contents, then the record that makes them visible, by exclusive creation.

Half a publication is never seen: without the record there is nothing to see. Two publishers of one fingerprint do not
mix: one record is created, and the other publisher returns it. A publication that was broken off goes on where it was,
because blobs that are there are not stored again. `roots` says how a collection meanwhile is dealt with.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

from serve.artifacts.blobs import BLOBS, blob_key, missing_blobs, upload_blobs
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.digests import DigestCache
from serve.artifacts.file_scan import NO_DIGEST, FoundFile, scan_directory
from serve.artifacts.file_state import FileState
from serve.artifacts.manifest import MANIFEST, FileEntry, Manifest
from serve.artifacts.objects import Objects
from serve.artifacts.port import ByteProgress
from serve.artifacts.roots import Pending, Roots
from serve.artifacts.sealing import seal
from serve.artifacts.step_record import StepRecord
from serve.artifacts.transfer_pools import transfer

_log = logging.getLogger(__name__)

BUNDLES = "bundles"
STEPS = "steps"
# Of files that are worth a listing of the store, to read them once instead of twice.
_LARGE_BYTES = 16 << 20
Record = TypeVar("Record", Manifest, StepRecord)


class Publisher:
    """Writes bundles and steps into one store.

    Args:
        objects: Of the store.
        roots: Of the store.
        digests: Of the files that are published.
    """

    def __init__(self, objects: Objects, roots: Roots, digests: DigestCache) -> None:
        self._objects = objects
        self._roots = roots
        self._digests = digests

    def publish(
        self,
        key: str,
        make: Callable[[tuple[FileEntry, ...]], Record],
        find: Callable[[], Record | None],
        directory: Path,
        progress: ByteProgress,
    ) -> Record:
        """Store files and their record.

        Args:
            key: Of the record.
            make: Makes it of the files.
            find: Returns the record that the store has; None: there is none whose contents are there.
            directory: Of the files; a manifest in it is passed over.
            progress: Told of bytes hashed and stored; each byte counts twice.
        """
        if found := find():
            return found
        sources = [file for file in scan_directory(directory) if file.relative != MANIFEST]
        # For its errors, before anything is stored.
        fingerprint = make(tuple(_entry(file, NO_DIGEST) for file in sources)).fingerprint
        with self._roots.pending(fingerprint) as pending:
            record = make(self._store(pending, directory, sources, progress))
            if self._objects.create(key, _json(record)):
                return record
            if found := find():
                return found
            # What is there cannot be used, its contents are gone: whole records replace each other, so nothing is
            # mixed.
            _log.warning("%s/%s: contents of this record are missing; replacing it", self._objects.url, key)
            self._objects.put(key, _json(record))
            return find() or record

    def _store(
        self, pending: Pending, directory: Path, sources: Sequence[FoundFile], progress: ByteProgress
    ) -> tuple[FileEntry, ...]:
        """Store contents, and return what they are; they stay until `pending` ends."""
        total = sum(source.size_bytes for source in sources)
        count = ByteCount(2 * total, progress)
        states = {source.relative: FileState.of(source.path.stat()) for source in sources}
        digests: dict[str, str] = {}
        one_pass = self._one_pass(sources)

        def store(source: FoundFile, _ranges: Executor) -> None:
            # One file after the other, not first all digests: what was just read is still in memory.
            digest = self._store_file(
                source, states[source.relative], lambda read: count.add(read, source.relative), source in one_pass
            )
            digests[source.relative] = digest
            pending.note(digest)
            count.set(2 * source.size_bytes, source.relative)

        transfer(store, sources)
        files = tuple(_entry(source, digests[source.relative]) for source in sources)
        while True:
            pending.write(digests.values())
            pending.settle()
            missing = missing_blobs(self._objects, files)
            if pending.is_fresh and not missing:
                return files
            upload_blobs(self._objects, missing, directory, states)

    def _one_pass(self, sources: Sequence[FoundFile]) -> frozenset[FoundFile]:
        """Return the large files that are certainly not in the store yet, if it can take them in one pass."""
        large = [source for source in sources if source.size_bytes >= _LARGE_BYTES]
        if not large or not self._objects.renames:
            return frozenset()
        there = {info.size_bytes for info in self._objects.listing(BLOBS)}
        return frozenset(source for source in large if source.size_bytes not in there)

    def _store_file(self, source: FoundFile, state: FileState, read: Callable[[int], None], is_new: bool) -> str:
        """Store a file's content, unless it is there; return its digest."""
        if is_new and self._digests.lookup(state) is None:
            began_ns = time.time_ns()
            digest = self._objects.ingest(source.path, state, blob_key, read)
            self._digests.remember(source.path, state, began_ns, digest)
            return digest
        digest = self._digests.digest(source.path, read)
        if self._objects.size(blob_key(digest)) != state.size_bytes:
            self._objects.upload(source.path, blob_key(digest), state)
        return digest


def _entry(source: FoundFile, digest: str) -> FileEntry:
    return FileEntry(path=source.relative, size_bytes=source.size_bytes, blake3=digest)


def _json(record: Manifest | StepRecord) -> bytes:
    return seal(record.model_dump(mode="json"))
