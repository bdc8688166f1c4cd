"""NodeCache: the bundles and step outputs that a node has, downloaded once for all its processes.

    blobs/<2 digits>/<BLAKE3>    contents, read-only; beside them what is being downloaded
    trees/<name>/                one directory per bundle or step: hard links to the blobs, and the manifest
    used/<name>                  its mtime says when the tree was asked for last
    locks/                       of trees and blobs, held by processes that work on them, or use them
    digests.sqlite               what was checked, and has not changed since

Contents are copied from the store, never linked: a link to a file of the store would change when somebody writes to
that, after it was checked. Where store and cache are on one file system that can, the copy shares its blocks, and
costs nothing.
"""

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from serve.artifacts.bundle_check import selected
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.cache_blobs import CacheBlobs
from serve.artifacts.cache_place import DATABASE, PLACE_VARIABLE, cache_limit, cache_root
from serve.artifacts.cache_room import describe_full, free_bytes_at, make_room, remove_leftovers
from serve.artifacts.digests import DigestCache
from serve.artifacts.fingerprint import canonical_json
from serve.artifacts.flock import FileLock
from serve.artifacts.manifest import MANIFEST, FileEntry, Manifest
from serve.artifacts.parsing import write_manifest
from serve.artifacts.port import ArtifactStore, ByteProgress, no_progress
from serve.artifacts.retry import is_disk_full
from serve.artifacts.step_record import StepRecord
from serve.artifacts.transfer_pools import transfer
from serve.errors import ConfigError

# How often a process looks how far another one's download is.
_LOOK_S = 0.2


class NodeCache:
    """The cache of a node, as one process sees it. What it fetched stays there until the process ends, or releases it.

    Args:
        root: Directory; None: `$RAYTRT_BUNDLE_CACHE`, or `~/.cache/raytrt/bundles`. Best a local disk.
        limit_bytes: What is used least recently is removed when there is more than this; None:
            `$RAYTRT_BUNDLE_CACHE_LIMIT` (200GiB, 40%), or half of the disk.
        free_bytes: How many bytes are free where a path is.

    Raises:
        ConfigError: The directory cannot be made, or the limit makes no sense.
    """

    def __init__(
        self,
        root: Path | None = None,
        limit_bytes: int | None = None,
        free_bytes: Callable[[Path], int] = free_bytes_at,
    ) -> None:
        self._free_bytes = free_bytes
        self._root = (root or cache_root()).absolute()
        try:
            for folder in ("blobs", "trees", "used", "locks"):
                (self._root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                f"bundle cache {self._root} cannot be made: {exc.strerror}; set {PLACE_VARIABLE} to another one"
            ) from exc
        self._limit_bytes = cache_limit(self._root) if limit_bytes is None else limit_bytes
        self._blobs = CacheBlobs(self._root, DigestCache(self._root / DATABASE))
        self._lock = threading.Lock()
        self._pins: dict[str, list[FileLock]] = {}

    @property
    def root(self) -> Path:
        """Where it is."""
        return self._root

    def fetch(
        self,
        store: ArtifactStore,
        manifest: Manifest,
        progress: ByteProgress = no_progress,
        only: Sequence[str] | None = None,
    ) -> Path:
        """Return the directory of a bundle on this node, complete and checked; files are read-only.

        Args:
            store: Where it is fetched from, if it is not here.
            manifest: Of the bundle.
            progress: Told of bytes that are here, also while another process brings them.
            only: Files and directories to have, for instance `tokenizer`; None: all.

        Raises:
            BundleCorrupt: The store does not have what the manifest says.
            StoreUnavailable: The store cannot be reached.
            ConfigError: There is no room on the disk.
        """
        content = write_manifest(manifest)
        return self._tree(store, manifest.fingerprint, selected(manifest.files, only), {MANIFEST: content}, progress)

    def fetch_step(self, store: ArtifactStore, record: StepRecord, progress: ByteProgress = no_progress) -> Path:
        """Return the directory of a step's output on this node, complete and checked; files are read-only.

        Raises:
            BundleCorrupt, StoreUnavailable, ConfigError: See `fetch`.
        """
        return self._tree(store, record.fingerprint, record.files, {}, progress)

    def release(self, directory: Path) -> None:
        """Let a directory go that this process does not use any more, so that it may be removed for lack of room."""
        with self._lock:
            pins = self._pins.pop(directory.name, [])
        for pin in pins:
            pin.release()

    def _tree(
        self,
        store: ArtifactStore,
        fingerprint: str,
        files: Sequence[FileEntry],
        extra: Mapping[str, bytes],
        progress: ByteProgress,
    ) -> Path:
        name = tree_name(fingerprint, files, extra)
        tree = self._root / "trees" / name
        pin = FileLock.take(self._root / "locks" / f"{name}.use", shared=True)
        try:
            (self._root / "used" / name).touch()
            count = ByteCount(sum(entry.size_bytes for entry in files), progress)
            with self._alone_on(name, files, count):
                if not self._is_intact(tree, files, extra, count):
                    self._bring(store, tree, files, extra, count)
        except BaseException as exc:
            pin.release()
            if is_disk_full(exc):
                raise ConfigError(describe_full(self._root, self._free_bytes(self._root))) from exc
            raise
        with self._lock:
            self._pins.setdefault(name, []).append(pin)
        progress(count.total, count.total)
        return tree

    def _alone_on(self, name: str, files: Sequence[FileEntry], count: ByteCount) -> FileLock:
        def look() -> None:
            count.set(self._blobs.present_bytes(files))
            time.sleep(_LOOK_S)

        lock = FileLock.take(self._root / "locks" / f"{name}.make", wait=look)
        count.set(0)
        return lock

    def _is_intact(self, tree: Path, files: Sequence[FileEntry], extra: Mapping[str, bytes], count: ByteCount) -> bool:
        if not tree.is_dir():
            return False
        if any(not _holds(tree / path, content) for path, content in extra.items()):
            return False
        if _strangers(tree, {*extra, *(entry.path for entry in files)}):
            return False
        return all(self._blobs.is_right(tree / entry.path, entry, count) for entry in files)

    def _bring(
        self,
        store: ArtifactStore,
        tree: Path,
        files: Sequence[FileEntry],
        extra: Mapping[str, bytes],
        count: ByteCount,
    ) -> None:
        remove_leftovers(self._root, tree.name)
        make_room(
            self._root,
            self._limit_bytes,
            self._blobs.missing_bytes(files),
            keep=frozenset(entry.blake3 for entry in files),
            free_bytes=self._free_bytes,
        )
        # A tree that is there and damaged may be in use: files are replaced in it, one by one, and it stays where it
        # is.
        place = tree if tree.is_dir() else tree.with_name(f".{tree.name}.{uuid.uuid4().hex}")
        try:
            place.mkdir(exist_ok=True)
            for stranger in _strangers(place, {*extra, *(entry.path for entry in files)}):
                stranger.unlink()

            def bring(entry: FileEntry, _ranges: Executor) -> None:
                target = place / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._blobs.link(store, entry, target, count)

            transfer(bring, files)
            for path, content in extra.items():
                _write(place / path, content)
            if place != tree:
                os.rename(place, tree)
        finally:
            if place != tree:
                shutil.rmtree(place, ignore_errors=True)


def tree_name(fingerprint: str, files: Sequence[FileEntry], extra: Mapping[str, bytes]) -> str:
    """Return the name of a tree; stores may have different bundles of a fingerprint, and some ask for a part of one."""
    content = [[entry.path, entry.blake3] for entry in files]
    others = {path: hashlib.sha256(data).hexdigest() for path, data in extra.items()}
    return f"{fingerprint}-{hashlib.sha256(canonical_json([content, others])).hexdigest()[:12]}"


def _strangers(tree: Path, expected: set[str]) -> list[Path]:
    """Return what is in a tree and does not belong there: somebody wrote into it."""
    return [
        path
        for path in tree.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(tree).as_posix() not in expected
    ]


def _holds(path: Path, content: bytes) -> bool:
    try:
        return not path.is_symlink() and path.read_bytes() == content
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    temporary.chmod(0o444)
    os.replace(temporary, path)
