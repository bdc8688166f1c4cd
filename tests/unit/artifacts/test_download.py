"""Downloads: resumed, checked, and tried again when the storage fails."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.artifacts import download
from serve.artifacts.blobs import blob_key
from serve.artifacts.byte_count import ByteCount
from serve.artifacts.download import download_blob, downloaded_bytes, partial_path, ranges_path
from serve.artifacts.manifest import FileEntry
from serve.artifacts.port import no_progress
from serve.artifacts.remote_objects import RemoteObjects
from serve.artifacts.retry import Retry
from serve.artifacts.store import Store
from serve.errors import BundleCorrupt, StoreUnavailable
from tests.unit.artifacts.fake_file_systems import Bucket, BucketFileSystem, register
from tests.unit.artifacts.fakes import FakeTime, MemoryObjects, manifest_fields, read_files, write_files

RANGE_BYTES = 10


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RANGE_BYTES", RANGE_BYTES)


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(path="model/weights", size_bytes=len(data), blake3=blake3(data).hexdigest())


def fetch(objects: MemoryObjects, entry: FileEntry, target: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        download_blob(objects, entry, target, pool, ByteCount(entry.size_bytes, no_progress), 0o444)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=55),
    partial=st.binary(max_size=60),
    ranges=st.binary(max_size=30)
    | st.lists(st.integers(0, 5)).map(lambda ns: b"".join(map(download._NUMBER.pack, ns))),
)
def test_whatever_an_earlier_download_left_the_file_is_right(
    tmp_path: Path, data: bytes, partial: bytes, ranges: bytes
) -> None:
    objects, target = MemoryObjects(), tmp_path / "target"
    entry = entry_of(data)
    objects.put(blob_key(entry.blake3), data)
    partial_path(target).write_bytes(partial)
    ranges_path(target).write_bytes(ranges)
    fetch(objects, entry, target)
    assert read_files(tmp_path) == {"target": data}
    assert target.stat().st_mode & 0o777 == 0o444
    target.unlink()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=55), at=st.integers(0, 54), how=st.sampled_from(["change", "cut", "grow"]))
def test_what_is_not_what_the_manifest_says_is_never_seen(tmp_path: Path, data: bytes, at: int, how: str) -> None:
    objects, target = MemoryObjects(), tmp_path / "target"
    entry = entry_of(data)
    at = at % len(data)
    damaged = {
        "change": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "cut": data[:at],
        "grow": data + b"x",
    }[how]
    objects.put(blob_key(entry.blake3), damaged)
    with pytest.raises(BundleCorrupt, match=entry.blake3):
        fetch(objects, entry, target)
    assert not target.exists()


def test_a_damaged_range_of_an_earlier_download_is_fetched_again(tmp_path: Path) -> None:
    objects, target, data = MemoryObjects(), tmp_path / "target", bytes(range(45))
    entry = entry_of(data)
    objects.put(blob_key(entry.blake3), data)
    partial_path(target).write_bytes(data[:20] + b"?" * 25)
    ranges_path(target).write_bytes(b"".join(download._NUMBER.pack(number) for number in (0, 1, 2)))
    assert downloaded_bytes(target, 45) == 30
    fetch(objects, entry, target)
    assert target.read_bytes() == data
    assert downloaded_bytes(target, 45) == 45


@pytest.fixture
def bucket() -> Bucket:
    register()
    BucketFileSystem.buckets["b"] = Bucket()
    return BucketFileSystem.buckets["b"]


def failing(times: int, error: Exception, *operations: str) -> "Failing":
    return Failing(times, error, operations)


class Failing:
    """Fails so many times, then works."""

    def __init__(self, times: int, error: Exception, operations: tuple[str, ...]) -> None:
        self.times = times
        self.error = error
        self.operations = operations

    def __call__(self, operation: str, _path: str) -> None:
        if operation in self.operations and self.times > 0:
            self.times -= 1
            raise self.error


def test_errors_that_pass_are_tried_again(bucket: Bucket, tmp_path: Path) -> None:
    time = FakeTime()
    store = Store(RemoteObjects("bucket://b/store", Retry(sleep=time.sleep)))
    files = write_files(tmp_path / "files", {"model/weights": os.urandom(95), "runtime.json": b"{}"})
    # "piped": it was done, and only the answer was lost.
    bucket.fail = failing(4, ConnectionError("reset"), "pipe", "piped", "info", "find")
    manifest = store.publish_bundle(manifest_fields("one"), files)
    bucket.fail = failing(4, TimeoutError(), "cat")
    store.materialize(manifest.files, tmp_path / "back")
    assert read_files(tmp_path / "back") == read_files(files)
    assert time.now_s > 1_000_000.0


def test_errors_that_stay_are_told(bucket: Bucket, tmp_path: Path) -> None:
    store = Store(RemoteObjects("bucket://b/store", Retry(sleep=FakeTime().sleep)))
    files = write_files(tmp_path / "files", {"model/weights": os.urandom(95)})
    bucket.fail = failing(100, ConnectionError("reset"), "pipe")
    with pytest.raises(StoreUnavailable, match=r"cannot write bucket://b/store/.*: ConnectionError: reset"):
        store.publish_bundle(manifest_fields("one"), files)
    bucket.fail = failing(1, PermissionError("no key"), "pipe")
    with pytest.raises(StoreUnavailable, match="no key"):
        store.publish_bundle(manifest_fields("one"), files)
    bucket.fail = failing(0, OSError())
    manifest = store.publish_bundle(manifest_fields("one"), files)
    bucket.fail = failing(1000, OSError("broken pipe"), "cat")
    with pytest.raises(StoreUnavailable, match="broken pipe"):
        store.materialize(manifest.files, tmp_path / "back")
    assert not (tmp_path / "back" / "model" / "weights").exists()


def test_the_first_failure_ends_a_transfer(bucket: Bucket, tmp_path: Path) -> None:
    store = Store(RemoteObjects("bucket://b/store"))
    files = write_files(tmp_path / "files", {f"model/{number}": os.urandom(1000) for number in range(30)})
    manifest = store.publish_bundle(manifest_fields("one"), files)
    del bucket.contents[f"b/store/{blob_key(manifest.files[0].blake3)}"]
    bucket.read_bytes = 0
    with pytest.raises(BundleCorrupt, match=r"model/0: blob .* is missing; publish the bundle again"):
        store.materialize(manifest.files, tmp_path / "back")
    assert bucket.read_bytes < 30_000


def test_a_link_in_the_target_is_not_followed(tmp_path: Path) -> None:
    store = Store(MemoryObjects())
    files = write_files(tmp_path / "files", {"model/weights": b"w"})
    manifest = store.publish_bundle(manifest_fields("one"), files)
    (tmp_path / "outside").mkdir()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "model").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleCorrupt, match="leads out of"):
        store.materialize(manifest.files, tmp_path / "back")
    assert not list((tmp_path / "outside").iterdir())
