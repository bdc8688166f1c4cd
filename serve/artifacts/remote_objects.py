"""RemoteObjects: whatever fsspec reaches by a URL: S3, Google Cloud Storage, Azure, and so on.

What is relied on
- objects appear whole: true of object stores (one request, or a multipart upload that is completed at the end).
  Elsewhere (SFTP, HDFS, ...) they are written under a temporary name and moved.
- exclusive creation, `pipe_file(mode="create")`: s3fs sends If-None-Match, gcsfs ifGenerationMatch=0, adlfs
  overwrite=False. Other file systems inherit "look, then write" from fsspec, and servers that only resemble S3 may
  ignore the header; both are noticed, and creation falls back to `create_by_settling`.

Source: https://filesystem-spec.readthedocs.io/en/latest/features.html#exclusive-write and the code of s3fs 2026.9,
gcsfs 2026.10, adlfs 2026.8.
"""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from serve.artifacts.digests import hash_file
from serve.artifacts.exclusive import create_by_settling
from serve.artifacts.file_copy import write_all
from serve.artifacts.file_state import FileState, check_unchanged
from serve.artifacts.objects import ObjectInfo
from serve.artifacts.retry import Retry
from serve.errors import BundleCorrupt, ConfigError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Protocols whose writes appear whole.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
# The first object of a store; also what exclusive creation is tried on.
MARKER = "store.json"
_MARKER_CONTENT = b'{"format": 1, "made_by": "raytrt"}\n'
# The keys under which listings say when an object was written.
_MODIFIED = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")


class RemoteObjects:
    """Objects of a file system of fsspec.

    Args:
        url: With protocol.
        retry: For what a network does.
        settle_s: See `create_by_settling`.
    """

    def __init__(self, url: str, retry: Retry | None = None, settle_s: float = 3.0) -> None:
        self._url = url.rstrip("/")
        self._retry = retry or Retry()
        self._settle_s = settle_s
        self._lock = threading.Lock()
        self._opened: tuple[int, AbstractFileSystem, str] | None = None
        self._exclusive: bool | None = None
        _open(self._url)  # for its errors

    @property
    def url(self) -> str:
        """Where it is."""
        return self._url

    @property
    def staleness_s(self) -> float:
        """For how long a listing may not show what another machine wrote: object stores are consistent."""
        return 0.0

    @property
    def _files(self) -> AbstractFileSystem:
        # An asynchronous file system has a thread, which a forked process does not inherit.
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), *_open(self._url))
            return self._opened[1]

    def _path(self, key: str) -> str:
        self._files  # noqa: B018  # opens it
        assert self._opened is not None
        return f"{self._opened[2].rstrip('/')}/{key}"

    def read(self, key: str) -> bytes | None:
        """Return an object; None: there is none."""

        def action() -> bytes | None:
            try:
                return bytes(self._files.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

        return self._run("read", key, action)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that must not be there yet."""
        if self._is_exclusive():
            return self._run("create", key, lambda: self._create(key, data))
        return create_by_settling(
            lambda: self.read(key),
            lambda content: self.put(key, content),
            data,
            self._retry.sleep,
            self._settle_s,
        )

    def _create(self, key: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._path(key), data, mode="create")
        except Exception:
            # Somebody else's, or ours whose answer was lost; libraries differ in how they say "it is there".
            found = self.read(key)
            if found is None:
                raise
            return found == data
        return True

    def _is_exclusive(self) -> bool:
        if self._exclusive is None:
            self._exclusive = self._run("create", MARKER, self._try_exclusive)
            if not self._exclusive:
                _log.warning(
                    "%s: this storage has no exclusive creation; each lock, version and publication waits %.0f s to "
                    "see whether it was alone. Writes that take longer can undo each other",
                    self._url,
                    self._settle_s,
                )
        return self._exclusive

    def _try_exclusive(self) -> bool:
        files = self._files
        base = AsyncFileSystem if isinstance(files, AsyncFileSystem) else AbstractFileSystem
        method = "_pipe_file" if base is AsyncFileSystem else "pipe_file"
        inherited = getattr(type(files), method) is getattr(base, method)
        for _ in range(0 if inherited else 2):
            try:
                files.pipe_file(self._path(MARKER), _MARKER_CONTENT, mode="create")
            except TypeError:
                return False  # it knows no mode
            except Exception:
                if self.read(MARKER) is None:
                    raise
                return True
        return False

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or overwrite it."""
        self._run("write", key, lambda: self._place(key, lambda path: self._files.pipe_file(path, data)))

    def upload(self, source: Path, key: str, state: FileState) -> None:
        """Write a file's content as an object, or overwrite it."""
        self._run("write", key, lambda: self._place(key, lambda path: self._files.put_file(str(source), path)))
        try:
            check_unchanged(source, state)
        except BundleCorrupt:
            self.delete(key)
            raise

    def _place(self, key: str, write: Callable[[str], Any]) -> None:
        files, path = self._files, self._path(key)
        protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
        if protocols & _WHOLE:
            write(path)
            return
        temporary = self._path(f"tmp/{uuid.uuid4().hex}")
        for parent in (temporary, path):
            files.makedirs(parent.rpartition("/")[0], exist_ok=True)
        try:
            write(temporary)
            files.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                files.rm_file(temporary)
            raise

    def ingest(self, source: Path, state: FileState, key_of: Callable[[str], str], read: Callable[[int], None]) -> str:
        """Do as `upload`, under a key that follows from the content; return the BLAKE3 of that."""
        digest = hash_file(source, read)
        if self.size(key_of(digest)) != state.size_bytes:
            self.upload(source, key_of(digest), state)
        return digest

    @property
    def renames(self) -> bool:
        """Object stores cannot: the key has to be known to write."""
        return False

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

        self._run("remove", key, action)

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None: there is none."""

        def action() -> int | None:
            path = self._path(key)
            self._files.invalidate_cache(path)
            try:
                found = self._files.info(path)
            except FileNotFoundError:
                return None
            return int(found["size"]) if found["type"] == "file" else None

        return self._run("look for", key, action)

    def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return the objects below `prefix/`, ordered by key."""

        def action() -> tuple[ObjectInfo, ...]:
            root = self._path("")
            self._files.invalidate_cache()
            entries = _find(self._files, self._path(prefix))
            infos = (_info(root, entry) for entry in entries)
            return tuple(sorted((info for info in infos if info), key=lambda info: info.key))

        return self._run("list", prefix, action)

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        """Write a part of an object into an open file, at the same offset."""
        return write_all(descriptor, self.read_range(key, start, length), start)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return a part of an object; less if it ends before, nothing if it is not there."""

        def action() -> bytes:
            try:
                return bytes(self._files.cat_file(self._path(key), start=start, end=start + length))
            except FileNotFoundError:
                return b""

        return self._run("read", key, action)

    def _run(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        return self._retry.run(f"cannot {verb} {self._url}/{key}", action)


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    """Open a file system that remembers no listings.

    Raises:
        ConfigError: There is no such protocol, its package is not installed, or its settings are wrong.
    """
    try:
        try:
            files, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except TypeError:  # one that takes no such setting
            files, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError, TypeError) as exc:
        raise ConfigError(f"store: {url!r} cannot be opened: {exc}") from exc
    return files, str(root)


def _find(files: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """List all files below a path, or fail.

    What fsspec's own `find` cannot list it leaves out without a word, and a collection would take that for what is not
    there; file systems with a `find` of their own (S3, GCS, ...) list everything in one go.
    """
    base = AsyncFileSystem if isinstance(files, AsyncFileSystem) else AbstractFileSystem
    method = "_find" if base is AsyncFileSystem else "find"
    if getattr(type(files), method) is not getattr(base, method):
        try:
            return [entry for entry in files.find(path, detail=True).values() if entry["type"] == "file"]
        except FileNotFoundError:
            return []
    found, folders = [], [path]
    while folders:
        try:
            entries = files.ls(folders.pop(), detail=True)
        except FileNotFoundError:
            continue
        folders += [entry["name"] for entry in entries if entry["type"] == "directory"]
        found += [entry for entry in entries if entry["type"] == "file"]
    return found


def _info(root: str, entry: dict[str, Any]) -> ObjectInfo | None:
    name = str(entry["name"])
    if not name.startswith(root):
        return None
    moment = next((entry[key] for key in _MODIFIED if entry.get(key) is not None), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    modified_s = moment.timestamp() if isinstance(moment, datetime) else moment
    return ObjectInfo(name[len(root) :], int(entry.get("size") or 0), modified_s)
