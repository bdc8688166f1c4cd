"""What every store does, whatever keeps its bytes: a directory, or anything that fsspec reaches."""

import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from serve.artifacts.file_state import FileState
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.objects import Objects
from serve.artifacts.port import ArtifactStore
from serve.artifacts.reference import parse_reference
from serve.artifacts.remote_objects import RemoteObjects
from serve.artifacts.retry import Retry
from serve.artifacts.store import Store
from serve.errors import BundleCorrupt, ConfigError
from tests.unit.artifacts import fake_file_systems
from tests.unit.artifacts.fakes import FakeTime, manifest_fields, print_of, read_files, step_fields, write_files

_numbers = itertools.count()


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture(params=["directory", "memory", "bucket", "plain"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, time: FakeTime) -> Objects:
    retry = Retry(sleep=time.sleep)
    if request.param == "directory":
        return LocalObjects(tmp_path / "store", retry)
    fake_file_systems.register()
    return RemoteObjects(f"{request.param}://place-{next(_numbers)}/store", retry)


@pytest.fixture
def store(objects: Objects) -> ArtifactStore:
    return Store(objects)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files", {"model/weights": b"w" * 100_000, "runtime.json": b"{}", "empty": b""})


@pytest.fixture
def publish(store: ArtifactStore, tmp_path: Path) -> Callable[[str], str]:
    def publish(label: str) -> str:
        directory = write_files(tmp_path / f"of-{label}", {"model/weights": label.encode(), "runtime.json": b"{}"})
        return store.publish_bundle(manifest_fields(label), directory).fingerprint

    return publish


# Objects


def test_objects_are_created_once(objects: Objects) -> None:
    assert objects.create("folder/key", b"first")
    assert not objects.create("folder/key", b"second")
    assert objects.create("folder/key", b"first")  # a caller that did not hear of its success
    assert objects.read("folder/key") == b"first"


def test_objects_are_replaced_listed_and_removed(objects: Objects) -> None:
    objects.put("a/one", b"1")
    objects.put("a/deep/two", b"22")
    objects.put("a/one", b"111")
    objects.put("ab/three", b"3")
    assert [(info.key, info.size_bytes) for info in objects.listing("a")] == [("a/deep/two", 2), ("a/one", 3)]
    assert objects.size("a/one") == 3
    objects.delete("a/one")
    objects.delete("a/one")
    assert objects.size("a/one") is None
    assert objects.read("a/one") is None
    assert objects.size("a/deep") is None
    assert objects.listing("nothing") == ()


def test_objects_are_read_in_parts(objects: Objects, tmp_path: Path) -> None:
    objects.put("key", b"0123456789")
    assert objects.read_range("key", 3, 4) == b"3456"
    assert objects.read_range("key", 8, 4) == b"89"
    assert objects.read_range("nothing", 0, 4) == b""
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(10)
        assert objects.copy_range("key", 4, 3, file.fileno()) == 3
        assert objects.copy_range("key", 8, 5, file.fileno()) == 2
        assert objects.copy_range("nothing", 0, 5, file.fileno()) == 0
    assert (tmp_path / "file").read_bytes() == b"\0\0\0\x00456\x0089"


def test_objects_are_made_of_files(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    state = FileState.of((tmp_path / "file").stat())
    objects.upload(tmp_path / "file", "a/key", state)
    assert objects.read("a/key") == b"content"
    read: list[int] = []
    digest = objects.ingest(tmp_path / "file", state, lambda digest: f"b/{digest}", read.append)
    assert objects.read(f"b/{digest}") == b"content"
    assert digest == blake3(b"content").hexdigest()
    assert sum(read) == 7
    (tmp_path / "file").write_bytes(b"changed")
    for key_of in (lambda digest: f"b/{digest}", lambda digest: f"c/{digest}"):
        with pytest.raises(BundleCorrupt, match="changed while it was read"):
            objects.ingest(tmp_path / "file", state, key_of, read.append)
    assert [info.key for info in (*objects.listing("b"), *objects.listing("c"))] == [f"b/{digest}"]


# Bundles and steps


def test_large_files_are_published_in_one_pass_and_once(store: Store, objects: Objects, tmp_path: Path) -> None:
    large = {"model/new": os.urandom(17 << 20), "model/more": os.urandom(18 << 20), "small": b"s"}
    directory = write_files(tmp_path / "large", large)
    seen: list[tuple[int, int]] = []
    manifest = store.publish_bundle(manifest_fields("one"), directory, lambda *done: seen.append(done))
    assert seen[-1] == (2 * manifest.size_bytes, 2 * manifest.size_bytes)
    assert store.find_damage(manifest.files) == ()
    again = store.publish_step(step_fields("one"), directory)
    assert again.files == manifest.files
    assert len(objects.listing("blobs")) == 3


def test_a_published_bundle_is_found_and_brought_back(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    assert store.find_bundle(print_of("one")) is None
    seen: list[tuple[int, int]] = []
    manifest = store.publish_bundle(manifest_fields("one"), files, lambda *done: seen.append(done))
    assert store.find_bundle(print_of("one")) == manifest
    assert [entry.path for entry in manifest.files] == ["empty", "model/weights", "runtime.json"]
    assert seen[-1][0] == seen[-1][1]
    store.materialize(manifest.files, tmp_path / "back", lambda *done: seen.append(done))
    assert read_files(tmp_path / "back") == read_files(files)
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)


def test_the_first_publisher_wins(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    first = store.publish_bundle(manifest_fields("one"), files)
    other = write_files(tmp_path / "other", {"model/weights": b"other"})
    assert store.publish_bundle(manifest_fields("one", name="later"), other) == first
    assert store.find_bundle(print_of("one")) == first


def test_a_step_is_published_and_brought_back(store: ArtifactStore, files: Path, tmp_path: Path) -> None:
    record = store.publish_step(step_fields("one", result={"loss": 0.5}), files)
    assert store.find_step(print_of("one")) == record
    assert store.find_step(print_of("two")) is None
    store.materialize(record.files, tmp_path / "back")
    assert read_files(tmp_path / "back") == read_files(files)


def test_a_step_whose_contents_are_gone_is_done_again(store: Store, objects: Objects, files: Path) -> None:
    record = store.publish_step(step_fields("one"), files)
    for info in objects.listing("blobs"):
        objects.delete(info.key)
    assert store.find_step(print_of("one")) is None
    assert store.publish_step(step_fields("one"), files) == record
    assert store.find_step(print_of("one")) == record


def test_a_bundle_without_contents_is_refused_and_mended(
    store: Store, objects: Objects, files: Path, tmp_path: Path
) -> None:
    manifest = store.publish_bundle(manifest_fields("one"), files)
    damaged = objects.listing("blobs")[0]
    objects.delete(damaged.key)
    with pytest.raises(BundleCorrupt, match=r"blobs/.* is missing"):
        store.materialize(manifest.files, tmp_path / "back")
    store.publish_bundle(manifest_fields("one"), files)
    store.materialize(manifest.files, tmp_path / "back")
    assert read_files(tmp_path / "back") == read_files(files)


def test_a_manifest_that_is_none_is_refused_and_replaced(store: Store, objects: Objects, files: Path) -> None:
    objects.put(f"bundles/{print_of('one')}.json", b'{"format_version": 1, "fing')
    with pytest.raises(BundleCorrupt, match="is no manifest"):
        store.find_bundle(print_of("one"))
    manifest = store.publish_bundle(manifest_fields("one"), files)
    assert store.find_bundle(print_of("one")) == manifest


def test_a_manifest_under_another_name_is_refused(store: Store, objects: Objects, files: Path) -> None:
    store.publish_bundle(manifest_fields("one"), files)
    objects.put(f"bundles/{print_of('two')}.json", objects.read(f"bundles/{print_of('one')}.json") or b"")
    with pytest.raises(BundleCorrupt, match=r"is the manifest of .*, not of"):
        store.find_bundle(print_of("two"))


def test_what_cannot_be_a_bundle_is_not_published(store: ArtifactStore, files: Path) -> None:
    (files / "link").symlink_to("runtime.json")
    with pytest.raises(BundleCorrupt, match=r"link is a symbolic link to runtime\.json"):
        store.publish_bundle(manifest_fields("one"), files)
    with pytest.raises(ConfigError, match="fingerprint"):
        store.publish_bundle({"fingerprint": "../../etc"}, files)
    assert store.find_bundle(print_of("one")) is None


def test_builds_lead_to_bundles(store: ArtifactStore, publish: Callable[[str], str]) -> None:
    fingerprint = publish("one")
    assert store.find_build(print_of("build")) is None
    store.record_build(print_of("build"), fingerprint)
    assert store.find_build(print_of("build")) == fingerprint
    store.record_build(print_of("other"), print_of("never published"))
    assert store.find_build(print_of("other")) is None


# Names


def test_versions_count_up(store: ArtifactStore, publish: Callable[[str], str]) -> None:
    one, two = publish("one"), publish("two")
    assert store.names() == ()
    assert [store.add_version("m", one, "first").number, store.add_version("m", two).number] == [1, 2]
    assert store.add_version("m", two).number == 2
    assert store.add_version("m", one).number == 3
    assert [(version.number, version.fingerprint) for version in store.versions("m")] == [(1, one), (2, two), (3, one)]
    assert store.versions("m")[0].note == "first"
    assert store.names() == ("m",)


def test_aliases_move_and_go_back(store: ArtifactStore, publish: Callable[[str], str]) -> None:
    one, two, three = publish("one"), publish("two"), publish("three")
    for fingerprint in (one, two, three):
        store.add_version("m", fingerprint)
        store.move_alias("m", "prod", fingerprint, reason="promoted")
    assert store.aliases("m")["prod"].fingerprint == three
    assert store.roll_back("m", "prod", reason="bad", rejected=three).fingerprint == two
    assert store.roll_back("m", "prod", reason="late", rejected=three).fingerprint == two  # it points elsewhere
    assert store.roll_back("m", "prod", reason="bad too", rejected=two).fingerprint == one
    with pytest.raises(ConfigError, match="no other bundle"):
        store.roll_back("m", "prod", reason="worse")
    moves = [(move.fingerprint, move.rejected) for move in store.history("m", "prod")]
    assert moves == [(one, None), (two, None), (three, None), (two, three), (one, two)]


def test_references_are_resolved(store: ArtifactStore, publish: Callable[[str], str]) -> None:
    one, two = publish("one"), publish("two")
    store.add_version("m", one)
    store.add_version("m", two)
    store.move_alias("m", "prod", one)
    for selector, expected in {
        "": two,
        "@latest": two,
        "@1": one,
        "@prod": one,
        f"@sha256:{two[:8]}": two,
        f"@sha256:{one}": one,
    }.items():
        assert store.resolve(parse_reference(f"s/m{selector}")).fingerprint == expected


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("s/other", r"no bundle named 'other'; it has: m"),
        ("s/m@2", r"no version '2'; versions of m: 1 \("),
        ("s/m@stage", r"no alias 'stage'; .*aliases: prod \("),
        ("s/m@sha256:00000000", r"no bundle with this fingerprint"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    store: ArtifactStore, publish: Callable[[str], str], reference: str, told: str
) -> None:
    fingerprint = publish("one")
    store.add_version("m", fingerprint)
    store.move_alias("m", "prod", fingerprint)
    with pytest.raises(ConfigError, match=told):
        store.resolve(parse_reference(reference))


def test_mistaken_names_are_refused(store: ArtifactStore, publish: Callable[[str], str]) -> None:
    fingerprint = publish("one")
    store.add_version("m", fingerprint)
    with pytest.raises(ConfigError, match="moves by itself"):
        store.move_alias("m", "latest", fingerprint)
    with pytest.raises(ConfigError, match="is no alias"):
        store.move_alias("m", "12", fingerprint)
    with pytest.raises(ConfigError, match="none of its versions"):
        store.move_alias("m", "prod", print_of("another"))
    with pytest.raises(ConfigError, match="is no name"):
        store.add_version("../m", fingerprint)
    with pytest.raises(ConfigError, match="there is no bundle"):
        store.add_version("m", print_of("another"))
    assert store.aliases("m") == {}


# Leases


def test_a_lock_is_waited_for(store: ArtifactStore) -> None:
    class Enough(Exception):
        pass

    told = []

    def wait(holder: str) -> None:
        told.append(holder)
        raise Enough

    with store.lock("build/../x", "first") as lock:
        with pytest.raises(Enough), store.lock("build/../x", "second", wait=wait):
            pass
        with store.lock("another", "second"):
            assert not lock.lost
    assert told[0].startswith("first (process ")
    with store.lock("build/../x", "third"):
        pass


def test_a_collection_keeps_what_is_needed(store: ArtifactStore, publish: Callable[[str], str], tmp_path: Path) -> None:
    prints = [publish(f"number {number}") for number in range(6)]
    for fingerprint in prints:
        store.add_version("m", fingerprint)
    store.move_alias("m", "prod", prints[0])
    store.use(prints[1], "deployment")
    assert store.collect(keep_versions=2, grace_s=1e9).bundles == ()
    # The fake file systems do not say when something was written, or say it was long ago.
    would = store.collect(keep_versions=2, grace_s=-1e9, dry_run=True)
    done = store.collect(keep_versions=2, grace_s=-1e9)
    assert would == done
    assert set(done.bundles) == {prints[2], prints[3]}
    for fingerprint in (prints[0], prints[1], prints[4], prints[5]):
        manifest = store.find_bundle(fingerprint)
        assert manifest is not None
        store.materialize(manifest.files, tmp_path / fingerprint)
    with pytest.raises(ConfigError, match="a collection removed it"):
        store.resolve(parse_reference("s/m@3"))
    with pytest.raises(ConfigError, match="a collection removed it"):
        store.use(prints[2], "deployment")


@pytest.mark.parametrize("damage", ["garbage", "digest"])
def test_a_collection_touches_nothing_if_a_manifest_cannot_be_trusted(
    store: Store, objects: Objects, publish: Callable[[str], str], damage: str
) -> None:
    good, key = publish("one"), f"bundles/{publish('two')}.json"
    written = objects.read(key) or b""
    entry = written.index(b'"blake3": "') + len(b'"blake3": "')
    changed = written[:entry] + (b"1" if written[entry : entry + 1] == b"0" else b"0") + written[entry + 1 :]
    objects.put(key, {"garbage": b"\0\0\0", "digest": changed}[damage])
    blobs = objects.listing("blobs")
    with pytest.raises(BundleCorrupt, match="nothing was removed"):
        store.collect(grace_s=-1e9)
    assert store.find_bundle(good) is not None
    assert objects.listing("blobs") == blobs


def test_a_bundle_is_whole_if_its_contents_are_there(
    store: Store, objects: Objects, publish: Callable[[str], str]
) -> None:
    fingerprint = publish("one")
    manifest = store.find_whole_bundle(fingerprint)
    assert manifest is not None
    assert manifest == store.find_bundle(fingerprint)
    blob = objects.listing("blobs")[0].key
    content = objects.read(blob) or b""
    objects.delete(blob)
    assert store.find_whole_bundle(fingerprint) is None
    objects.put(blob, content)
    assert store.find_whole_bundle(fingerprint) == manifest
    objects.put(f"bundles/{fingerprint}.json", b"{}")
    assert store.find_whole_bundle(fingerprint) is None


# Elsewhere


def test_a_store_goes_to_other_processes_by_its_address(tmp_path: Path, files: Path) -> None:
    store = Store(LocalObjects(tmp_path / "store"))
    manifest = store.publish_bundle(manifest_fields("one"), files)
    assert pickle.loads(pickle.dumps(store)).find_bundle(manifest.fingerprint) == manifest


# Going back


def promoted(store: Store, publish: Callable[[str], str]) -> list[str]:
    """Publish three bundles, each of which the alias then pointed to; return their fingerprints."""
    prints = [publish(label) for label in ("one", "two", "three")]
    for fingerprint in prints:
        store.add_version("m", fingerprint)
        store.move_alias("m", "prod", fingerprint)
    return prints


def test_a_rollback_passes_over_bundles_that_are_damaged(
    store: Store, objects: Objects, publish: Callable[[str], str]
) -> None:
    prints = promoted(store, publish)
    manifest = store.find_bundle(prints[1])
    assert manifest is not None
    objects.delete(f"blobs/{manifest.files[0].blake3[:2]}/{manifest.files[0].blake3}")
    assert store.roll_back("m", "prod", reason="it babbles", rejected=prints[2]).fingerprint == prints[0]


def test_a_rollback_does_not_mind_a_record_that_is_gone(
    store: Store, objects: Objects, publish: Callable[[str], str]
) -> None:
    prints = promoted(store, publish)
    objects.delete("names/m/aliases/prod/00000002.json")
    assert store.roll_back("m", "prod", reason="it babbles").fingerprint == prints[0]
