"""kill -9 of a process with a store in a directory, or with a node's cache, at each of its operations on files."""

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from serve.artifacts import download
from serve.artifacts.bundle_check import verify_directory
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.manifest import Manifest
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.store import Store, open_store
from tests.unit.artifacts.fakes import bundle_contents, manifest_fields, print_of, read_files, write_files
from tests.unit.artifacts.killed_process import run_killed

FILES = {"model/weights": b"w" * 5000, "runtime.json": b"{}"}


def publish(place: Path, files: Path) -> None:
    store = open_store(str(place))
    store.publish_bundle(manifest_fields("one"), files)
    store.add_version("m", print_of("one"))
    with store.lock("build", "builder"):
        store.move_alias("m", "prod", print_of("one"))


def fetch(place: Path, cache: Path) -> None:
    store = open_store(str(place))
    NodeCache(cache, 1 << 40).fetch(store, found(store))


def found(store: Store) -> Manifest:
    manifest = store.find_bundle(print_of("one"))
    assert manifest is not None
    return manifest


def every_death(tmp_path: Path, action: Callable[..., None], make: Callable[[Path], tuple[Path, ...]]) -> list[Path]:
    """Kill a process at every operation of an action, each time in a new place; return the places."""
    places = []
    for operation in count():
        place = tmp_path / f"killed-{operation}"
        place.mkdir()
        places.append(place)
        if not run_killed(action, make(place), str(place), operation):
            return places
    raise AssertionError("unreachable")


def test_a_publisher_that_is_killed_leaves_nothing_half(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", FILES)
    places = every_death(tmp_path, publish, lambda place: (place / "store", files))
    assert len(places) > 30
    for place in places:
        store = open_store(str(place / "store"))
        manifest = store.find_bundle(print_of("one"))
        assert manifest is None or bundle_contents(store.objects, manifest.files) == FILES
        publish(place / "store", files)
        assert bundle_contents(store.objects, found(store).files) == FILES
        assert store.aliases("m")["prod"].fingerprint == print_of("one")
        assert not list((place / "store" / "pending").iterdir()) or store.collect(grace_s=0.0).bundles == ()
        assert not list((place / "store" / "pending").iterdir())  # what the dead one needed, nobody needs


def test_a_download_that_is_killed_is_resumed(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files", FILES)
    publish(tmp_path / "store", files)
    places = every_death(tmp_path, fetch, lambda place: (tmp_path / "store", place / "cache"))
    assert len(places) > 20
    store = open_store(str(tmp_path / "store"))
    for place in places:
        for tree in (place / "cache" / "trees").glob("[!.]*"):
            assert verify_directory(tree) == found(store)
        cache = NodeCache(place / "cache", 1 << 40)
        directory = cache.fetch(store, found(store))
        assert verify_directory(directory) == found(store)
        left = {path.name for path in (place / "cache" / "trees").iterdir()}
        assert left == {directory.name}
        assert not list((place / "cache" / "blobs").glob("*/*.*"))


class CountedObjects(LocalObjects):
    """A directory's objects; the process is killed when so many ranges were read."""

    def __init__(self, directory: Path, ranges: int) -> None:
        super().__init__(directory)
        self.ranges = ranges
        self.read_bytes = 0

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        if self.ranges == 0:
            os.kill(os.getpid(), 9)
        self.ranges -= 1
        self.read_bytes += length
        return super().copy_range(key, start, length, descriptor)


def fetch_ranges(place: Path, cache: Path, range_bytes: int, ranges: int) -> None:
    download.RANGE_BYTES = range_bytes  # of this process, which is a test's own
    store = Store(CountedObjects(place, ranges))
    NodeCache(cache, 1 << 40).fetch(store, found(store))


def test_only_what_was_not_there_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, range_bytes = 1_000_000, 10_000
    files = write_files(tmp_path / "files", {"model/weights": os.urandom(size)})
    publish(tmp_path / "store", files)
    assert run_killed(fetch_ranges, (tmp_path / "store", tmp_path / "cache", range_bytes, 60), "/nowhere", 1 << 30)
    monkeypatch.setattr(download, "RANGE_BYTES", range_bytes)
    objects = CountedObjects(tmp_path / "store", -1)
    store = Store(objects)
    directory = NodeCache(tmp_path / "cache", 1 << 40).fetch(store, found(store))
    assert (directory / "model/weights").read_bytes() == (files / "model/weights").read_bytes()
    # Ranges that were being written when it was killed are written again: as many as there are threads.
    assert objects.read_bytes <= size - (60 - 16) * range_bytes
    assert read_files(directory).keys() == {"manifest.json", "model/weights"}
