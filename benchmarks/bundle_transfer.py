"""How fast bundles are published and fetched, beside a plain copy of the same files on the same disk.

    python -m benchmarks.bundle_transfer [--directory DIR] [--gib 2] [--rounds 4]

A bundle of random bytes, one large file and several smaller ones. Publication into a store in a directory, and the
fetch into a node's cache, are measured beside `cp` and fsync, with cold sources (the kernel is told to forget them)
and empty targets, in pairs of changing order: a virtual disk often slows down the longer it is written to. Then eight
processes fetch the bundle at once, and the bytes that were read from the store are counted.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Report
from serve.artifacts.digests import hash_file
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.manifest import Manifest
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.store import Store, open_store

_CHUNK = 8 << 20
_PROCESSES = 8
_SMALL_FILES = 8


class CountingObjects(LocalObjects):
    """Objects of a directory that write down how many bytes were read."""

    def __init__(self, directory: Path, log: Path) -> None:
        super().__init__(directory)
        self._log = log

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        """Count, and read."""
        copied = super().copy_range(key, start, length, descriptor)
        with open(self._log, "ab", buffering=0) as log:
            log.write(b"%d\n" % copied)
        return copied


def main() -> None:
    """Measure, and write benchmarks/results/bundle_transfer.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the temporary directory")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    report = Report("bundle_transfer", "python -m benchmarks.bundle_transfer")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="raytrt-transfer-") as folder:
        place = Path(folder)
        source = place / "source"
        size = make_files(source, int(options.gib * 2**30))
        report.note(
            f"{size / 2**30:.2f} GiB of random bytes, half in one file, half in {_SMALL_FILES}; {options.rounds} rounds"
        )
        measure(report, place, source, size, options.rounds)
        fetch_at_once(report, place, source, size)
    report.finish()


def make_files(directory: Path, size: int) -> int:
    """Write random files; return their size in bytes."""
    sizes = {"model/large.safetensors": size // 2}
    sizes |= {f"model/part-{number}.safetensors": size // 2 // _SMALL_FILES for number in range(_SMALL_FILES)}
    for name, length in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for start in range(0, length, _CHUNK):
                file.write(os.urandom(min(_CHUNK, length - start)))
            os.fsync(file.fileno())
    return sum(sizes.values())


def measure(report: Report, place: Path, source: Path, size: int, rounds: int) -> None:
    """Publish and fetch, each in pairs with a plain copy, of which the one and the other comes first in turn."""
    store_place = place / "store"
    store = open_store(str(store_place))
    report.add("hash", size / timed(source, lambda: [hash_file(path) for path in files_of(source)]) / 1e9, "GB/s")
    subjects: dict[str, tuple[Path, Path, Callable[[], object]]] = {
        "publish": (source, place / "new", lambda: open_store(str(place / "new")).publish_bundle(fields(), source)),
        "fetch": (
            store_place,
            place / "cache",
            lambda: NodeCache(place / "cache", 1 << 50).fetch(store, published(store)),
        ),
    }
    store.publish_bundle(fields(), source)
    for name, (read, made, action) in subjects.items():
        copies, ours = [], []
        for number in range(rounds):
            for is_copy in (True, False) if number % 2 == 0 else (False, True):
                if is_copy:
                    copies.append(timed(source, lambda: plain_copy(source, place / "copy")))
                    shutil.rmtree(place / "copy")
                else:
                    ours.append(timed(read, action))
                    shutil.rmtree(made)
            print(f"  round {number + 1}: copy {copies[-1]:.2f} s, {name} {ours[-1]:.2f} s", file=sys.stderr)
        report.add(f"plain copy, beside {name}", size / statistics.median(copies) / 1e9, "GB/s")
        report.add(name, size / statistics.median(ours) / 1e9, "GB/s")
        ratios = [copy / own for copy, own in zip(copies, ours, strict=True)]
        report.add(f"{name}, over plain copy (median of pairs)", statistics.median(ratios), "", ">= 0.7")


def timed(read: Path, action: Callable[[], object]) -> float:
    """Return how long something takes, in seconds, whose files the kernel has to read from the disk."""
    forget(read)
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def fetch_at_once(report: Report, place: Path, source: Path, size: int) -> None:
    """Let several processes fetch at once, and count what they read."""
    store_place, cache_place, log = place / "store", place / "cache", place / "read.log"
    open_store(str(store_place)).publish_bundle(fields(), source)
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    processes = [
        context.Process(target=fetch_counting, args=(store_place, cache_place, log)) for _ in range(_PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - began
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed to fetch")
    read = sum(map(int, log.read_text().split()))
    report.add(f"{_PROCESSES} processes at once, bytes read over the bundle's size", read / size, "", "<= 1")
    report.add(f"{_PROCESSES} processes at once", seconds, "s")


def fetch_counting(store_place: Path, cache_place: Path, log: Path) -> None:
    """Fetch the bundle in this process."""
    store = Store(CountingObjects(store_place, log))
    NodeCache(cache_place, 1 << 50).fetch(store, published(store))


def plain_copy(source: Path, target: Path) -> None:
    """Copy files with `cp`, and flush each to the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in files_of(target):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def forget(directory: Path) -> None:
    """Tell the kernel not to keep what it read, and finish what it has to write."""
    os.sync()
    for path in files_of(directory):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(directory: Path) -> list[Path]:
    """Return all files, in order."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def published(store: Store) -> Manifest:
    """Return the bundle."""
    found = store.find_bundle("a" * 64)
    assert found is not None
    return found


def fields() -> dict[str, object]:
    """Return a manifest without files."""
    return {
        "fingerprint": "a" * 64,
        "name": "random",
        "kind": "trtllm-checkpoint",
        "model": {"source": "random", "digest": "none", "architecture": "None"},
        "provenance": {"created": "2026-01-01T00:00:00Z", "raytrt": "0"},
    }


if __name__ == "__main__":
    main()
