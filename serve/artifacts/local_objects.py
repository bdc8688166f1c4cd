"""LocalObjects: a directory of this machine, or one that several machines mount (NFS and its like)."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from serve.artifacts.digests import hash_file
from serve.artifacts.exclusive import create_by_settling
from serve.artifacts.file_copy import copy_file, copy_range, flush_directory
from serve.artifacts.file_state import FileState, check_unchanged
from serve.artifacts.mounts import NETWORK_STALENESS_S, is_on_network
from serve.artifacts.objects import ObjectInfo
from serve.artifacts.retry import Retry

TEMPORARY = "tmp"
_T = TypeVar("_T")
# What `link` says on file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


class LocalObjects:
    """Objects as files. Each is written under a temporary name, flushed to the disk, and then given its name.

    Renaming replaces what has the name, so `create` makes a hard link instead, which fails if the name is taken, on NFS
    too.

    Args:
        directory: Made when something is written.
        retry: For what a network file system may fail to do.
    """

    def __init__(self, directory: Path, retry: Retry | None = None) -> None:
        self._directory = directory
        self._retry = retry or Retry()

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._directory)

    @property
    def staleness_s(self) -> float:
        """For how long a listing may not show what another machine wrote or removed."""
        return NETWORK_STALENESS_S if is_on_network(self._directory) else 0.0

    def read(self, key: str) -> bytes | None:
        """Return an object; None: there is none."""

        def action() -> bytes | None:
            try:
                with self._open(key) as descriptor:
                    return _read_all(descriptor)
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._run("read", key, action)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that must not be there yet."""

        def action() -> bool:
            with self._temporary() as temporary:
                _write_new(temporary, data)
                try:
                    self._give_name(temporary, key, os.link)
                except FileExistsError:
                    return self.read(key) == data
                except OSError as exc:
                    if exc.errno not in _NO_LINKS:
                        raise
                    return self._create_without_links(key, data)
                return True

        return self._run("create", key, action)

    def _create_without_links(self, key: str, data: bytes) -> bool:
        return create_by_settling(
            lambda: self.read(key), lambda content: self.put(key, content), data, self._retry.sleep
        )

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or overwrite it."""

        def action() -> None:
            with self._temporary() as temporary:
                _write_new(temporary, data)
                self._give_name(temporary, key, os.replace)

        self._run("write", key, action)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

        def action() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self._directory / key)

        self._run("remove", key, action)

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None: there is none."""

        def action() -> int | None:
            try:
                # Opened, because what NFS says of a file that it does not open may be a minute old.
                with self._open(key) as descriptor:
                    status = os.fstat(descriptor)
                    return status.st_size if stat.S_ISREG(status.st_mode) else None
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as exc:
                if exc.errno == errno.ELOOP:  # a symbolic link is no object
                    return None
                raise

        return self._run("look for", key, action)

    def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return the objects below `prefix/`, ordered by key."""
        return self._run("list", prefix, lambda: tuple(sorted(self._walk(prefix), key=lambda info: info.key)))

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        # Without `raise`, what cannot be listed would be taken for what is not there, and a collection removes that.
        for parent, _, names in os.walk(self._directory / prefix, onerror=_raise_unless_missing):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = path.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        key = path.relative_to(self._directory).as_posix()
                        yield ObjectInfo(key, status.st_size, status.st_mtime)

    def upload(self, source: Path, key: str, state: FileState) -> None:
        """Write a file's content as an object, or overwrite it."""

        def action() -> None:
            with self._temporary() as temporary:
                copy_file(source, temporary)
                check_unchanged(source, state)
                temporary.chmod(0o444)
                self._give_name(temporary, key, os.replace)

        self._run("write", key, action)

    def ingest(self, source: Path, state: FileState, key_of: Callable[[str], str], read: Callable[[int], None]) -> str:
        """Do as `upload`, under a key that follows from the content; return the BLAKE3 of that."""

        def action() -> str:
            # Side by side, so that neither waits for the other; whoever comes second finds the file in memory.
            with self._temporary() as temporary, ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing:
                hashed = hashing.submit(hash_file, source, read)
                copy_file(source, temporary)
                digest = hashed.result()
                check_unchanged(source, state)
                temporary.chmod(0o444)
                if self.size(key_of(digest)) != state.size_bytes:
                    self._give_name(temporary, key_of(digest), os.replace)
                return digest

        return self._run("write", str(source), action)

    @property
    def renames(self) -> bool:
        """Files are copied and hashed at once, and get their names then."""
        return True

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        """Write a part of an object into an open file, at the same offset."""

        def action() -> int:
            try:
                with self._open(key) as source:
                    return copy_range(source, descriptor, start, length)
            except FileNotFoundError:
                return 0

        return self._run("read", key, action)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return a part of an object; less if it ends before, nothing if it is not there."""

        def action() -> bytes:
            try:
                with self._open(key) as source:
                    return os.pread(source, length, start)
            except FileNotFoundError:
                return b""

        return self._run("read", key, action)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[int]:
        # A symbolic link is never ours: it would let whoever may write into the store show us any file of this machine.
        descriptor = os.open(self._directory / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self._directory / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _give_name(self, temporary: Path, key: str, give: Callable[[Path, Path], None]) -> None:
        target = self._directory / key
        target.parent.mkdir(parents=True, exist_ok=True)
        give(temporary, target)
        flush_directory(target.parent)

    def _run(self, verb: str, key: str, action: Callable[[], _T]) -> _T:
        return self._retry.run(f"cannot {verb} {self._directory / key}", action)


def _raise_unless_missing(exc: OSError) -> None:
    if not isinstance(exc, FileNotFoundError | NotADirectoryError):
        raise exc


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)
