"""Room on a node's disk: remove what was used least recently, and what no process uses."""

import logging
import os
import shutil
from pathlib import Path

from serve.artifacts.flock import FileLock
from serve.errors import ConfigError

_log = logging.getLogger(__name__)

# What is left free for everything else on the disk.
RESERVE_BYTES = 1 << 30


def make_room(root: Path, limit_bytes: int, needed_bytes: int, reserve_bytes: int = RESERVE_BYTES) -> None:
    """Remove trees of a cache until so many more bytes fit, within the limit and on the disk.

    The limit gives way to what is in use; the disk does not.

    Raises:
        ConfigError: They do not fit on the disk.
    """
    if needed_bytes == 0:
        return
    with FileLock.take(root / "locks" / "room"):
        while True:
            over = used_bytes(root) + needed_bytes - limit_bytes
            short = needed_bytes + reserve_bytes - shutil.disk_usage(root).free
            if max(over, short) <= 0:
                return
            if not _remove_oldest(root):
                break
    if needed_bytes > shutil.disk_usage(root).free:
        raise ConfigError(
            f"bundle cache {root}: {_gib(needed_bytes)} are to be downloaded, and its disk has "
            f"{_gib(shutil.disk_usage(root).free)} free; make room there, or set RAYTRT_BUNDLE_CACHE to a directory on "
            "another disk"
        )
    if over > 0:
        _log.warning("bundle cache %s: %s more than its limit, and all of it is in use", root, _gib(over))


def used_bytes(root: Path) -> int:
    """Return the size of all contents of a cache."""
    return sum(path.stat().st_blocks * 512 for path in (root / "blobs").glob("*/*") if path.is_file())


def remove_unused(root: Path) -> int:
    """Remove contents that no tree has, and nobody downloads; return their size in bytes."""
    freed = 0
    for path in (root / "blobs").glob("*/*"):
        digest = path.name.partition(".")[0]
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


def _remove_oldest(root: Path) -> bool:
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
        remove_unused(root)
        return True
    return remove_unused(root) > 0


def _asked_for(root: Path, name: str) -> float:
    try:
        return (root / "used" / name).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
