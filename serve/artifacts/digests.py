"""DigestCache: BLAKE3 of files, computed in parallel, and remembered as long as the files do not change.

A file is known again by device, inode, size, and the times of its last change of content (mtime) and of anything
(ctime), in nanoseconds. The path is not part of it: a hard link is the same file. A change that leaves mtime as it was
still sets ctime, which no program can set back. What changed in the last moment before it was read is not remembered,
because another change in the same tick of the file system's clock would not be seen.
"""

import contextlib
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from serve.artifacts.byte_count import ByteCount
from serve.artifacts.file_scan import scan_directory
from serve.artifacts.file_state import FileState, check_unchanged
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.port import ByteProgress, no_progress

_log = logging.getLogger(__name__)

_BUFFER_BYTES = 8 << 20
# Two at a time keep a disk busy; BLAKE3 itself spreads over the cores.
_FILES_AT_ONCE = 4
# FAT and some network file systems count in two seconds; local ones in milliseconds.
TICK_NS = 2_000_000_000


class DigestCache:
    """Digests of files, kept in a small database that several processes may share.

    Args:
        database: File of the database, made with its directory; None: nothing outlasts this object.
        now_ns: Nanoseconds since the epoch.
    """

    def __init__(self, database: Path | None = None, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._connection = _open(database)
        # Nobody closes a cache that is forgotten; Python warns of a database that is.
        self._close = weakref.finalize(self, self._connection.close)

    def digest(self, path: Path, read: Callable[[int], None] | None = None) -> str:
        """Return the BLAKE3 of a file's content, 64 hexadecimal digits.

        Args:
            path: Of the file.
            read: Told how many more bytes are done, whether they were read or known.

        Raises:
            OSError: It cannot be read.
            BundleCorrupt: It changed meanwhile.
        """
        before = FileState.of(path.stat())
        if known := self.lookup(before):
            if read is not None:
                read(before.size_bytes)
            return known
        began_ns = self._now_ns()
        digest = hash_file(path, read)
        check_unchanged(path, before)
        self.remember(path, before, began_ns, digest)
        return digest

    def remember(self, path: Path, before: FileState, began_ns: int, digest: str) -> None:
        """Remember the digest of a file, if that can be relied on.

        Args:
            path: Of the file.
            before: Its state before it was read.
            began_ns: When reading it began, nanoseconds since the epoch.
            digest: Of what was read.
        """
        if before.ctime_ns < began_ns - TICK_NS and FileState.of(path.stat()) == before:
            self.record(before, digest)

    def digests(self, paths: Sequence[Path], progress: ByteProgress = no_progress) -> dict[Path, str]:
        """Return the digests of many files, computed in parallel."""
        count = ByteCount(sum(path.stat().st_size for path in paths), progress)
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="digest") as pool:
            return dict(zip(paths, pool.map(lambda path: self.digest(path, count.add), paths), strict=True))

    def lookup(self, state: FileState) -> str | None:
        """Return the digest of a file that was seen in this state; None: it was not."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            row = self._connection.execute(
                "SELECT digest FROM digests WHERE device=? AND inode=? AND size=? AND mtime=? AND ctime=?", _row(state)
            ).fetchone()
            return str(row[0]) if row else None
        return None

    def record(self, state: FileState, digest: str) -> None:
        """Remember the digest of a file in a state. Only a cache: if it cannot be written, it is not."""
        with self._lock, contextlib.suppress(sqlite3.Error), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", (*_row(state), digest))

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._close()


def tree_digest(directory: Path, cache: DigestCache | None = None, progress: ByteProgress = no_progress) -> str:
    """Return the fingerprint of all files of a directory: their paths and contents.

    Raises:
        BundleCorrupt: Something in it is no plain file.
    """
    cache = cache or DigestCache()
    files = scan_directory(directory)
    digests = cache.digests([file.path for file in files], progress)
    return fingerprint({file.relative: digests[file.path] for file in files})


def hash_file(path: Path, read: Callable[[int], None] | None = None) -> str:
    """Return the BLAKE3 of a file's content; `read` is told how many more bytes are done."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    # Not mapped into memory: a file that is cut short meanwhile would kill this process.
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            if read is not None:
                read(count)
    return hasher.hexdigest()


def _row(state: FileState) -> tuple[str, str, int, int, int]:
    # SQLite's integers have 64 bits and a sign; device and inode numbers may need the sign's bit.
    return str(state.device), str(state.inode), state.size_bytes, state.mtime_ns, state.ctime_ns


def _open(database: Path | None) -> sqlite3.Connection:
    """Open the database; one that is damaged is begun anew, and where none can be written, none is."""
    if database is not None:
        for _ in range(2):
            try:
                database.parent.mkdir(parents=True, exist_ok=True)
                return _prepared(sqlite3.connect(database, timeout=10.0, check_same_thread=False))
            except sqlite3.DatabaseError:
                with contextlib.suppress(OSError):
                    database.unlink()
            except OSError:
                break
        _log.warning("%s cannot be written: digests of files are computed again by every process", database)
    return _prepared(sqlite3.connect(":memory:", check_same_thread=False))


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.execute("PRAGMA synchronous = OFF")  # a cache: what a power cut destroys is made again
    connection.execute(
        "CREATE TABLE IF NOT EXISTS digests (device TEXT, inode TEXT, size INTEGER, mtime INTEGER, ctime INTEGER, "
        "digest TEXT, PRIMARY KEY (device, inode))"
    )
    return connection
