"""Publication: first the contents, then the record that makes them visible, by exclusive creation.

Half a publication is never seen: without the record there is nothing to see. Two publishers of one fingerprint do not
mix: one record is created, and the other publisher returns it. A publication that was broken off goes on where it was,
because blobs that are there are not stored again. `roots` says how a collection meanwhile is dealt with.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from serve.artifacts.blobs import missing_blobs, upload_blobs
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.digests import DigestCache
from serve.artifacts.file_scan import scan_directory
from serve.artifacts.file_state import FileState
from serve.artifacts.manifest import MANIFEST, FileEntry, Manifest
from serve.artifacts.objects import Objects
from serve.artifacts.port import ByteProgress
from serve.artifacts.roots import Pending, Roots
from serve.artifacts.step_record import StepRecord

_log = logging.getLogger(__name__)

BUNDLES = "bundles"
STEPS = "steps"
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
            find: Returns the record that the store has; None: there is none that can be used.
            directory: Of the files; a manifest in it is passed over.
            progress: Told of bytes hashed and stored; each byte counts twice.
        """
        if found := self._complete(find):
            return found
        files, states = self._describe(directory, progress)
        record = make(files)
        with self._roots.pending(record.fingerprint) as pending:
            self._store(pending, files, directory, states, progress)
            if self._objects.create(key, _json(record)):
                return record
            if found := self._complete(find):
                return found
            # What is there cannot be used, its contents are gone: whole records replace each other, so nothing is
            # mixed.
            _log.warning("%s/%s: contents of this record are missing; replacing it", self._objects.url, key)
            self._objects.put(key, _json(record))
            return self._complete(find) or record

    def _complete(self, find: Callable[[], Record | None]) -> Record | None:
        found = find()
        return None if found is None or missing_blobs(self._objects, found.files) else found

    def _describe(self, directory: Path, progress: ByteProgress) -> tuple[tuple[FileEntry, ...], dict[str, FileState]]:
        found = [file for file in scan_directory(directory) if file.relative != MANIFEST]
        states = {file.relative: FileState.of(file.path.stat()) for file in found}
        digests = self._digests.digests([file.path for file in found], lambda done, total: progress(done, 2 * total))
        entries = (
            FileEntry(path=file.relative, size_bytes=states[file.relative].size_bytes, blake3=digests[file.path])
            for file in found
        )
        return tuple(entries), states

    def _store(
        self,
        pending: Pending,
        files: tuple[FileEntry, ...],
        directory: Path,
        states: Mapping[str, FileState],
        progress: ByteProgress,
    ) -> None:
        total = sum(entry.size_bytes for entry in files)
        while True:
            pending.write({entry.blake3 for entry in files})
            missing = missing_blobs(self._objects, files)
            count = ByteCount(2 * total, progress)
            count.add(2 * total - sum(entry.size_bytes for entry in missing))
            upload_blobs(self._objects, missing, directory, states, count)
            pending.settle()
            if pending.is_fresh and not missing_blobs(self._objects, files):
                return


def _json(record: Manifest | StepRecord) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()
