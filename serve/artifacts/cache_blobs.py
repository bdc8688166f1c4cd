"""CacheBlobs: the contents that a node has, each downloaded by one process, and linked into the trees."""

import os
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from serve.artifacts.byte_count import ByteCount
from serve.artifacts.digests import DigestCache, hash_file
from serve.artifacts.download import downloaded_bytes, remove_partial
from serve.artifacts.file_state import FileState
from serve.artifacts.flock import FileLock
from serve.artifacts.manifest import FileEntry
from serve.artifacts.port import ArtifactStore, ByteProgress
from serve.errors import BundleCorrupt

READ_ONLY = 0o444
_LOOK_S = 0.2


class CacheBlobs:
    """The blobs below a cache's root.

    Args:
        root: Of the cache.
        digests: What is known of its files. A new link to a file changes its ctime, so that is recorded anew.
    """

    def __init__(self, root: Path, digests: DigestCache) -> None:
        self._root = root
        self._digests = digests

    def path(self, digest: str) -> Path:
        """Return where a content is."""
        return self._root / "blobs" / digest[:2] / digest

    def present_bytes(self, files: Sequence[FileEntry]) -> int:
        """Return how many bytes of files are here, or were downloaded up to now, roughly."""
        return sum(downloaded_bytes(self.path(entry.blake3), entry.size_bytes) for entry in files)

    def missing_bytes(self, files: Sequence[FileEntry]) -> int:
        """Return how many bytes are to be downloaded for files."""
        contents = {entry.blake3: entry.size_bytes for entry in files}
        return sum(size - downloaded_bytes(self.path(digest), size) for digest, size in contents.items())

    def is_right(self, path: Path, entry: FileEntry, count: ByteCount | None = None) -> bool:
        """Return whether a file has the content that an entry says. It is read only if it changed since it last was.

        Args:
            path: Of the file.
            entry: What it has to be.
            count: Told of its bytes.
        """

        def read(more: int) -> None:
            if count is not None:
                count.add(more, entry.path)

        try:
            status = path.lstat()
            state = FileState.of(status)
            if not stat.S_ISREG(status.st_mode) or state.size_bytes != entry.size_bytes:
                return False
            return (self._digests.lookup(state) or self._read(path, state, read)) == entry.blake3
        except FileNotFoundError:
            return False

    def link(self, store: ArtifactStore, entry: FileEntry, target: Path, count: ByteCount) -> None:
        """Give a content a name in a tree; download it first, if it is not here.

        Args:
            store: Where it is downloaded from.
            entry: Which content.
            target: The name; what has it now is replaced, if it is not right.
            count: Told of its bytes.

        Raises:
            BundleCorrupt, StoreUnavailable: See `ArtifactStore.materialize`.
        """
        blob = self.path(entry.blake3)
        blob.parent.mkdir(parents=True, exist_ok=True)

        def look() -> None:
            count.set(downloaded_bytes(blob, entry.size_bytes), entry.path)
            time.sleep(_LOOK_S)

        with FileLock.take(self._root / "locks" / f"{entry.blake3}.blob", wait=look):
            if not self.is_right(target, entry):
                if self.is_right(blob, entry):
                    remove_partial(blob)  # of a process that was killed at its last step
                else:
                    blob.unlink(missing_ok=True)
                    self._download(store, entry, blob, lambda done, _total: count.set(done, entry.path))
                self._link(blob, target)
        count.set(entry.size_bytes, entry.path)

    def _download(self, store: ArtifactStore, entry: FileEntry, blob: Path, progress: ByteProgress) -> None:
        here = FileEntry(path=entry.blake3, size_bytes=entry.size_bytes, blake3=entry.blake3)
        try:
            store.materialize([here], blob.parent, progress)
        except BundleCorrupt as exc:
            raise BundleCorrupt(f"{entry.path}: {exc}") from exc
        blob.chmod(READ_ONLY)
        self._digests.record(FileState.of(blob.stat()), entry.blake3)

    def _link(self, blob: Path, target: Path) -> None:
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        before = FileState.of(blob.stat())
        os.link(blob, temporary)
        os.replace(temporary, target)
        self._known_again(before, blob)

    def _known_again(self, before: FileState, path: Path) -> None:
        """Keep what is known of a file whose ctime changed because a name of it was added or removed by us."""
        digest = self._digests.lookup(before)
        after = FileState.of(path.stat())
        if digest is not None and replace(before, ctime_ns=after.ctime_ns) == after:
            self._digests.record(after, digest)

    def _read(self, path: Path, state: FileState, read: Callable[[int], None]) -> str:
        digest = hash_file(path, read)
        if FileState.of(path.stat()) == state:
            self._digests.record(state, digest)
        return digest
