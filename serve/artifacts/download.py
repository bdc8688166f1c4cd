"""Download: one blob into one file, in parallel ranges, checked before it has its name, and resumed after a crash.

While it is under way there are two files beside the one to be: `.partial`, as large as the whole, and `.ranges`, to
which the number of each range that was written is added. A process that was killed leaves both, and the next one goes
on. All of the file is read back and hashed in any case, in order, behind the ranges that arrive: what `.ranges` says
decides what is fetched, never what is believed.
"""

import os
import struct
import threading
from concurrent.futures import Executor, Future
from pathlib import Path

from blake3 import blake3

from serve.artifacts.blobs import blob_key
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import Objects
from serve.errors import BundleCorrupt

RANGE_BYTES = 16 << 20
_BUFFER_BYTES = 4 << 20
_NUMBER = struct.Struct("<I")


def partial_path(target: Path) -> Path:
    """Return where a file is while it is not complete."""
    return target.with_name(target.name + ".partial")


def ranges_path(target: Path) -> Path:
    """Return where the ranges of it are noted that are there."""
    return target.with_name(target.name + ".ranges")


def downloaded_bytes(target: Path, size_bytes: int) -> int:
    """Return how far a download is that perhaps another process does, in bytes, roughly."""
    try:
        return min(size_bytes, ranges_path(target).stat().st_size // _NUMBER.size * RANGE_BYTES)
    except FileNotFoundError:
        return size_bytes if target.exists() else 0


def download_blob(
    objects: Objects,
    entry: FileEntry,
    target: Path,
    pool: Executor,
    count: ByteCount,
    mode: int = 0o644,
) -> None:
    """Fetch a blob. Only one process at a time may do it for one target.

    Args:
        objects: Where blobs are.
        entry: Which one.
        target: The file to be; there is none. Its directory exists.
        pool: For the ranges.
        count: Told of bytes that are there.
        mode: Of the file.

    Raises:
        BundleCorrupt: The blob is missing, too short or too long, or has another digest.
    """
    _check_size(objects, entry)
    for is_last in (False, True):
        found = _fetch(objects, entry, target, pool, count)
        if found == entry.blake3:
            break
        # What an earlier process left may be the reason, or the way here: once more, from nothing.
        remove_partial(target)
        count.set(0, entry.path)
        if is_last:
            raise BundleCorrupt(
                f"{_where(objects, entry)} has BLAKE3 {found}, the manifest says {entry.blake3}; the "
                "blob was damaged in the store: remove it there and publish the bundle again"
            )
    partial = partial_path(target)
    os.chmod(partial, mode)
    os.replace(partial, target)
    ranges_path(target).unlink(missing_ok=True)


def remove_partial(target: Path) -> None:
    """Remove what a download left."""
    for path in (ranges_path(target), partial_path(target)):
        path.unlink(missing_ok=True)


def _check_size(objects: Objects, entry: FileEntry) -> None:
    size = objects.size(blob_key(entry.blake3))
    if size is None:
        raise BundleCorrupt(f"{_where(objects, entry)} is missing; publish the bundle again")
    if size != entry.size_bytes:
        raise BundleCorrupt(
            f"{_where(objects, entry)} has {size} bytes, the manifest says {entry.size_bytes}; remove "
            "the blob there and publish the bundle again"
        )


def _fetch(objects: Objects, entry: FileEntry, target: Path, pool: Executor, count: ByteCount) -> str:
    """Bring all ranges into the partial file; return its digest."""
    journal_path = ranges_path(target)
    descriptor = os.open(partial_path(target), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        known = _known_ranges(journal_path) if os.fstat(descriptor).st_size == entry.size_bytes else set()
        os.truncate(descriptor, entry.size_bytes)
        with open(journal_path, "ab" if known else "wb", buffering=0) as journal:
            lock = threading.Lock()

            def fetch(number: int) -> None:
                start = number * RANGE_BYTES
                length = min(RANGE_BYTES, entry.size_bytes - start)
                if objects.copy_range(blob_key(entry.blake3), start, length, descriptor) != length:
                    raise BundleCorrupt(f"{_where(objects, entry)} ends before byte {start + length}")
                with lock:
                    journal.write(_NUMBER.pack(number))

            numbers = range(-(-entry.size_bytes // RANGE_BYTES))
            futures = {number: pool.submit(fetch, number) for number in numbers if number not in known}
            try:
                digest = _hash_behind(descriptor, entry, futures, count)
            except BaseException:
                for future in futures.values():
                    future.cancel()
                _wait_for(futures)  # the descriptor is closed next, and its number used again
                raise
        os.fsync(descriptor)
        return digest
    finally:
        os.close(descriptor)


def _hash_behind(descriptor: int, entry: FileEntry, futures: dict[int, "Future[None]"], count: ByteCount) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    # One buffer for all: memory that is new each time costs more than reading into it.
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, entry.size_bytes)))
    for number, start in enumerate(range(0, entry.size_bytes, RANGE_BYTES)):
        if number in futures:
            futures[number].result()
        end = min(start + RANGE_BYTES, entry.size_bytes)
        while start < end:
            read = os.preadv(descriptor, [buffer[: end - start]], start)
            if not read:
                break
            hasher.update(buffer[:read])
            start += read
            count.add(read, entry.path)
    return hasher.hexdigest()


def _wait_for(futures: dict[int, "Future[None]"]) -> None:
    for future in futures.values():
        if not future.cancelled():
            future.exception()


def _known_ranges(path: Path) -> set[int]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    whole = len(data) // _NUMBER.size * _NUMBER.size
    return {number for (number,) in _NUMBER.iter_unpack(data[:whole])}


def _where(objects: Objects, entry: FileEntry) -> str:
    return f"blob {objects.url}/{blob_key(entry.blake3)}"
