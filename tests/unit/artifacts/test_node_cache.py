"""The cache of a node: one download, checked contents, room."""

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.artifacts.bundle_check import check_bundle, verify_directory
from serve.artifacts.cache_place import DATABASE, LIMIT_VARIABLE, PLACE_VARIABLE, cache_limit, cache_root, parse_limit
from serve.artifacts.cache_room import make_room, used_bytes
from serve.artifacts.digests import DigestCache
from serve.artifacts.file_state import FileState
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.manifest import FileEntry, Manifest
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.port import ByteProgress, no_progress
from serve.artifacts.store import Store, open_store
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable
from tests.forks import fork_server
from tests.unit.artifacts.fakes import manifest_fields, print_of, read_files, step_fields, write_files

MIB = 1 << 20
PLENTY = 1 << 40


class CountedStore(Store):
    """A store that remembers what was brought from it; shared by processes through a file."""

    def __init__(self, place: Path, log: Path) -> None:
        super().__init__(LocalObjects(place))
        self._log = log

    def materialize(self, files: Sequence[FileEntry], directory: Path, progress: ByteProgress = no_progress) -> None:
        with open(self._log, "ab", buffering=0) as log:
            log.write("".join(f"{entry.blake3}\n" for entry in files).encode())
        super().materialize(files, directory, progress)


@pytest.fixture
def store(tmp_path: Path) -> CountedStore:
    return CountedStore(tmp_path / "store", tmp_path / "log")


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", PLENTY)


def publish(store: Store, tmp_path: Path, label: str, files: dict[str, bytes]) -> Manifest:
    return store.publish_bundle(manifest_fields(label), write_files(tmp_path / f"of-{label}", files))


def brought(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


FILES = {"model/weights": b"w" * 1000, "tokenizer/tokenizer.json": b"{}", "runtime.json": b"{ }"}


def test_a_bundle_is_fetched_complete_and_read_only(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    seen: list[tuple[int, int]] = []
    directory = cache.fetch(store, manifest, lambda *done: seen.append(done))
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)
    assert {path: data for path, data in read_files(directory).items() if path != "manifest.json"} == FILES
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in directory.rglob("*") if path.is_file())
    assert verify_directory(directory) == check_bundle(directory) == manifest
    assert cache.fetch(store, manifest) == directory
    assert len(brought(tmp_path)) == 3


def test_only_what_is_asked_for_is_fetched(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    part = cache.fetch(store, manifest, only=("tokenizer", "runtime.json"))
    assert read_files(part).keys() == {"tokenizer/tokenizer.json", "runtime.json", "manifest.json"}
    assert len(brought(tmp_path)) == 2
    assert check_bundle(part, only=("tokenizer", "runtime.json")) == manifest
    with pytest.raises(BundleCorrupt, match="model/weights is missing"):
        check_bundle(part)
    whole = cache.fetch(store, manifest)
    assert verify_directory(whole) == manifest
    assert len(brought(tmp_path)) == 3  # what was here is not brought again


def test_contents_that_bundles_and_steps_share_are_brought_once(
    store: CountedStore, cache: NodeCache, tmp_path: Path
) -> None:
    shared = {"model/weights": b"w" * 1000, "model/again": b"w" * 1000}
    manifest = publish(store, tmp_path, "one", shared)
    record = store.publish_step(step_fields("one"), tmp_path / "of-one")
    step = cache.fetch_step(store, record)
    assert read_files(step) == shared
    bundle = cache.fetch(store, manifest)
    assert len(brought(tmp_path)) == 1
    assert (step / "model/weights").samefile(bundle / "model/again")


def fetch_in_process(place: Path, log: Path, cache: Path) -> None:
    store = CountedStore(place, log)
    manifest = store.find_bundle(print_of("one"))
    assert manifest is not None
    directory = NodeCache(cache, PLENTY).fetch(store, manifest)
    assert verify_directory(directory) == manifest


def test_many_processes_bring_a_bundle_once(store: CountedStore, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", {f"model/{number}": os.urandom(200_000) for number in range(10)})
    context = fork_server()
    arguments = (tmp_path / "store", tmp_path / "log", tmp_path / "cache")
    processes = [context.Process(target=fetch_in_process, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert sorted(brought(tmp_path)) == sorted(entry.blake3 for entry in manifest.files)


def test_who_waits_for_another_download_sees_how_far_it_is(store: Store, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", {"model/weights": os.urandom(40 * MIB)})
    half, go_on = threading.Event(), threading.Event()

    class HalfWay(LocalObjects):
        def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
            if start:
                half.set()
                go_on.wait()
            return super().copy_range(key, start, length, descriptor)

    first = threading.Thread(target=lambda: cache.fetch(Store(HalfWay(tmp_path / "store")), manifest))
    first.start()
    half.wait()
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            go_on.set()

    NodeCache(tmp_path / "cache", PLENTY).fetch(store, manifest, progress)
    first.join()
    partial = {done for done, _ in seen} - {0, manifest.size_bytes}
    assert partial  # told before it was complete
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)


# Damage


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_changed_file_is_seen_and_replaced(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    directory = cache.fetch(store, manifest)
    damage(directory / "model/weights", b"W" + b"w" * 999)
    with pytest.raises(BundleCorrupt, match="model/weights has BLAKE3"):
        check_bundle(directory)
    assert cache.fetch(store, manifest) == directory
    assert check_bundle(directory) == verify_directory(directory) == manifest
    assert len(brought(tmp_path)) == 4


def test_removed_and_added_files_are_mended(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    directory = cache.fetch(store, manifest)
    (directory / "runtime.json").unlink()
    (directory / "model" / "engine.cache").write_bytes(b"by an engine")
    damage(directory / "manifest.json", b"{}")
    assert cache.fetch(store, manifest) == directory
    assert verify_directory(directory) == manifest
    assert len(brought(tmp_path)) == 3


def test_a_link_that_somebody_put_there_is_replaced(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    directory = cache.fetch(store, manifest)
    (tmp_path / "elsewhere").write_bytes(FILES["model/weights"])
    (directory / "model/weights").unlink()
    (directory / "model/weights").symlink_to(tmp_path / "elsewhere")
    cache.fetch(store, manifest)
    assert not (directory / "model/weights").is_symlink()
    assert verify_directory(directory) == manifest


def test_nothing_is_read_again_that_did_not_change(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    directory = cache.fetch(store, manifest)
    cache.fetch(store, manifest, only=("model",))  # more names of the same contents: ctime changes
    known = DigestCache(cache.root / DATABASE)
    for entry in manifest.files:
        assert known.lookup(FileState.of((directory / entry.path).stat())) == entry.blake3
    known.close()


def test_a_failed_fetch_leaves_no_tree_and_no_lock(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)
    blob = next(path for path in (tmp_path / "store" / "blobs").glob("*/*") if path.stat().st_size == 1000)
    blob.unlink()
    with pytest.raises(BundleCorrupt, match=r"model/weights: blob .* is missing"):
        cache.fetch(store, manifest)
    assert not list((tmp_path / "cache" / "trees").iterdir())
    store.publish_bundle(manifest_fields("one"), tmp_path / "of-one")
    assert verify_directory(cache.fetch(store, manifest)) == manifest


# Room


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(store: Store, tmp_path: Path) -> None:
    manifests = [publish(store, tmp_path, f"number {n}", {"model/weights": os.urandom(MIB)}) for n in range(4)]
    root = tmp_path / "cache"
    owner = NodeCache(root, PLENTY)
    directories = [owner.fetch(store, manifest) for manifest in manifests[:3]]
    for age, directory in enumerate(directories):
        os.utime(root / "used" / directory.name, (1000 + age, 1000 + age))
    owner.release(directories[1])
    owner.release(directories[2])
    # Number 0 was used longest ago, but this process still has it; then comes number 1.
    NodeCache(root, int(3.5 * MIB)).fetch(store, manifests[3])
    assert [directory.exists() for directory in directories] == [True, False, True]
    assert used_bytes(root) == 3 * MIB
    assert verify_directory(directories[0]) == manifests[0]


def test_a_bundle_that_another_process_uses_stays(store: Store, tmp_path: Path) -> None:
    one, two = (publish(store, tmp_path, label, {"model/weights": os.urandom(MIB)}) for label in ("one", "two"))
    root = tmp_path / "cache"
    ready, done = (fork_server().Event() for _ in range(2))
    process = fork_server().Process(target=use_until, args=(tmp_path / "store", root, ready, done))
    process.start()
    ready.wait()
    (used,) = (root / "trees").iterdir()
    mine = NodeCache(root, MIB)
    mine.release(mine.fetch(store, two))
    assert used.exists()
    done.set()
    process.join()
    assert process.exitcode == 0
    three = publish(store, tmp_path, "three", {"model/weights": os.urandom(MIB)})
    mine.fetch(store, three)
    assert not used.exists()
    assert verify_directory(NodeCache(root, PLENTY).fetch(store, one)) == one


def use_until(place: Path, root: Path, ready: threading.Event, done: threading.Event) -> None:
    store = open_store(str(place))
    manifest = store.find_bundle(print_of("one"))
    assert manifest is not None
    cache = NodeCache(root, PLENTY)
    cache.fetch(store, manifest)
    ready.set()
    done.wait()


def test_what_killed_processes_left_goes_when_room_is_needed(store: Store, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", {"model/weights": os.urandom(MIB)})
    directory = cache.fetch(store, manifest)
    cache.release(directory)
    half = directory.with_name(f".{directory.name}.0123")
    shutil.copytree(directory, half, copy_function=os.link)
    orphan = cache.root / "blobs" / "00" / ("0" * 64 + ".partial")
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x" * MIB)
    make_room(cache.root, MIB, MIB // 2)
    assert not half.exists()
    assert not orphan.exists()
    assert used_bytes(cache.root) == 0


def test_a_full_disk_is_told_before_the_download(store: CountedStore, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", {"model/weights": os.urandom(3 * MIB)})
    cache = NodeCache(tmp_path / "cache", PLENTY, free_bytes=lambda _: 2 * MIB)
    with pytest.raises(ConfigError, match=rf"3\.0 MiB are to be downloaded, .*2\.0 MiB free; .*{PLACE_VARIABLE}"):
        cache.fetch(store, manifest)
    assert brought(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_is_told(store: CountedStore, cache: NodeCache, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path, "one", FILES)

    class FullStore(CountedStore):
        def materialize(self, *_: object, **__: object) -> None:
            raise StoreUnavailable("cannot read") from OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="make room there"):
        cache.fetch(FullStore(tmp_path / "store", tmp_path / "log"), manifest)


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"cannot be made: Not a directory; set {PLACE_VARIABLE}"):
        NodeCache(tmp_path / "file" / "cache", PLENTY)


def test_place_and_limit_come_from_the_environment(tmp_path: Path) -> None:
    assert cache_root({PLACE_VARIABLE: str(tmp_path)}) == tmp_path
    assert cache_root({}) == Path("~/.cache/raytrt/bundles").expanduser()
    assert cache_limit(tmp_path, {LIMIT_VARIABLE: "3GiB"}) == 3 << 30
    assert cache_limit(tmp_path, {}) == shutil.disk_usage(tmp_path).total // 2
    with pytest.raises(ConfigError, match=rf"{LIMIT_VARIABLE}: 'lots' is no size"):
        cache_limit(tmp_path, {LIMIT_VARIABLE: "lots"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("25%", 250), ("100 %", 1000), ("1.5 KiB", 1536), ("2kB", 2000), ("7", 7), ("1TiB", 1 << 40), ("3g", 3 * 10**9)],
)
def test_limits_are_sizes_or_shares(text: str, expected: int) -> None:
    assert parse_limit(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "%", "0%", "101%", "-5", "5 XB", "nan%", "five"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_limit(text, 1000)
