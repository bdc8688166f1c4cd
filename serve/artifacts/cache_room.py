"""Room on a node's disk: remove what was used least recently, and what no process uses."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from serve.artifacts.cache_place import PLACE_VARIABLE
from serve.artifacts.flock import FileLock
from serve.artifacts.size_text import size_text
from serve.errors import ConfigError

_log = logging.getLogger(__name__)

# What is left free for everything else on the disk.
RESERVE_BYTES = 1 << 30


def free_bytes_at(path: Path) -> int:
    """Return how many bytes are free on the disk of a path."""
    return shutil.disk_usage(path).free


def make_room(
    root: Path,
    limit_bytes: int,
    needed_bytes: int,
    *,
    keep: frozenset[str] = frozenset(),
    reserve_bytes: int = RESERVE_BYTES,
    free_bytes: Callable[[Path], int] = free_bytes_at,
) -> None:
    """Remove trees of a cache until so many more bytes fit, within the limit and on the disk.

    The limit gives way to what is in use; the disk does not.

    Args:
        root: Of the cache.
        limit_bytes: What it may have.
        needed_bytes: What is to be downloaded.
        keep: Digests of contents that are not to be removed, although no tree has them yet.
        reserve_bytes: What is left free on the disk, if that can be had.
        free_bytes: How many bytes are free where a path is.

    Raises:
        ConfigError: They do not fit on the disk.
    """
    if needed_bytes == 0:
        return
    with FileLock.take(root / "locks" / "room"):
        while True:
            over = used_bytes(root) + needed_bytes - limit_bytes
            short = needed_bytes + reserve_bytes - free_bytes(root)
            if max(over, short) <= 0:
                return
            if not _remove_oldest(root, keep):
                break
    if needed_bytes > free_bytes(root):
        raise ConfigError(describe_full(root, free_bytes(root), needed_bytes))
    if over > 0:
        _log.warning("bundle cache %s: %s more than its limit, and all of it is in use", root, size_text(over))


def describe_full(root: Path, free_bytes: int, needed_bytes: int | None = None) -> str:
    """Return the message about a disk without room for a download."""
    free = size_text(free_bytes)
    needed = f"{size_text(needed_bytes)} are to be downloaded, and its" if needed_bytes is not None else "its"
    return (
        f"bundle cache {root}: {needed} disk has {free} free; make room there, or set {PLACE_VARIABLE} to a directory "
        "on another disk"
    )


def used_bytes(root: Path) -> int:
    """Return the size of all contents of a cache."""
    return sum(path.stat().st_blocks * 512 for path in (root / "blobs").glob("*/*") if path.is_file())


def remove_leftovers(root: Path, name: str) -> None:
    """Remove what a process left that was killed while it made or removed a tree. Whoever calls it is alone on that."""
    for path in (root / "trees").glob(f".{name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_all_leftovers(root: Path) -> None:
    for path in (root / "trees").glob(".*"):
        name = path.name.split(".")[1]
        if lock := FileLock.try_take(root / "locks" / f"{name}.make"):
            with lock:
                remove_leftovers(root, name)


def remove_unused(root: Path, keep: frozenset[str] = frozenset()) -> int:
    """Remove contents that no tree has, and nobody downloads; return their size in bytes."""
    freed = 0
    _remove_all_leftovers(root)
    for path in (root / "blobs").glob("*/*"):
        digest = path.name.partition(".")[0]
        if digest in keep:
            continue
        lock = FileLock.try_take(root / "locks" / f"{digest}.blob")
        if lock is None:
            continue
        with lock:
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if status.st_nlink == 1:
                path.unlink()
                freed += status.st_blocks * 512
            os.unlink(root / "locks" / f"{digest}.blob")
    return freed


def _remove_oldest(root: Path, keep: frozenset[str]) -> bool:
    """Remove the tree that was asked for longest ago of those that nobody uses; return whether that made room."""
    trees = [path for path in (root / "trees").iterdir() if not path.name.startswith(".")]
    for tree in sorted(trees, key=lambda path: _asked_for(root, path.name)):
        lock = FileLock.try_take(root / "locks" / f"{tree.name}.use")
        if lock is None:
            continue
        with lock:
            _log.info("bundle cache: removing %s to make room", tree)
            gone = tree.with_name(f".{tree.name}.removed")
            os.rename(tree, gone)
            shutil.rmtree(gone)
            (root / "used" / tree.name).unlink(missing_ok=True)
            os.unlink(root / "locks" / f"{tree.name}.use")
            (root / "locks" / f"{tree.name}.make").unlink(missing_ok=True)
        remove_unused(root, keep)
        return True
    return remove_unused(root, keep) > 0


def _asked_for(root: Path, name: str) -> float:
    try:
        return (root / "used" / name).stat().st_mtime
    except FileNotFoundError:
        return 0.0
