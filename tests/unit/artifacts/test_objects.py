"""What storages do, each in its own way."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from serve.artifacts.exclusive import create_by_settling
from serve.artifacts.file_copy import copy_file
from serve.artifacts.file_state import FileState
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.mounts import is_on_network
from serve.artifacts.objects import Objects
from serve.artifacts.remote_objects import MARKER, RemoteObjects
from serve.artifacts.retry import Retry
from serve.artifacts.store import open_objects, open_store
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable
from tests.unit.artifacts.fake_file_systems import Bucket, BucketFileSystem, PlainFileSystem, register
from tests.unit.artifacts.fakes import FakeTime, MemoryObjects, write_files


@pytest.fixture
def retry() -> Retry:
    return Retry(sleep=FakeTime().sleep)


@pytest.fixture
def bucket() -> Bucket:
    register()
    BucketFileSystem.buckets["b"] = Bucket()
    return BucketFileSystem.buckets["b"]


# Addresses


def test_stores_are_opened_by_their_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_objects("place").url == str(tmp_path / "place")
    assert open_objects("~/store").url == str(tmp_path / "home" / "store")
    assert open_objects(f"file://{tmp_path}/x").url == str(tmp_path / "x")
    assert open_objects("memory://x/").url == "memory://x"
    with pytest.raises(ConfigError, match=r"store: 'nothing://x' cannot be opened: Protocol not known"):
        open_store("nothing://x")
    assert not list(tmp_path.iterdir())  # nothing is made before something is written


# Directories


def test_many_threads_create_an_object_once(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path)
    created = []

    def create(number: int) -> None:
        if objects.create("a/b/c", str(number).encode()):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert objects.read("a/b/c") == str(created[0]).encode()
    assert not list((tmp_path / "tmp").iterdir())


class NoLinks(LocalObjects):
    """A directory of a file system without hard links."""

    def _give_name(self, temporary: Path, key: str, give: Any) -> None:
        if give is os.link:
            raise OSError(errno.EPERM, "Operation not permitted")
        super()._give_name(temporary, key, give)


def test_without_hard_links_creation_settles(tmp_path: Path, retry: Retry) -> None:
    objects = NoLinks(tmp_path, retry)
    assert objects.create("key", b"first")
    assert not objects.create("key", b"second")
    assert objects.read("key") == b"first"


def test_links_that_somebody_put_into_a_store_are_no_objects(tmp_path: Path, retry: Retry) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    objects = LocalObjects(tmp_path / "store", retry)
    objects.put("folder/key", b"")
    (tmp_path / "store" / "folder" / "link").symlink_to(tmp_path / "secret")
    assert objects.size("folder/link") is None
    assert [info.key for info in objects.listing("folder")] == ["folder/key"]
    with pytest.raises(StoreUnavailable, match="symbolic links"):
        objects.read("folder/link")


def test_a_listing_that_fails_is_no_short_listing(tmp_path: Path, retry: Retry) -> None:
    objects = LocalObjects(tmp_path, retry)
    objects.put("folder/deep/key", b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreUnavailable, match="cannot list"):
        objects.listing("loop")


def test_a_store_that_cannot_be_a_directory_says_so(tmp_path: Path, retry: Retry) -> None:
    (tmp_path / "file").write_bytes(b"")
    objects = LocalObjects(tmp_path / "file", retry)
    assert objects.read("key") is None
    with pytest.raises(StoreUnavailable, match=r"cannot write .*file/key"):
        objects.put("key", b"")


@pytest.mark.parametrize("adapter", ["directory", "memory", "bucket"])
def test_a_file_that_changes_while_it_is_stored_is_not(tmp_path: Path, bucket: Bucket, adapter: str) -> None:
    source = write_files(tmp_path / "files", {"a": b"content"}) / "a"
    state = FileState.of(source.stat())
    source.write_bytes(b"other content")
    adapters: dict[str, Objects] = {
        "directory": LocalObjects(tmp_path / "store"),
        "memory": MemoryObjects(),
        "bucket": RemoteObjects("bucket://b/store"),
    }
    objects = adapters[adapter]
    with pytest.raises(BundleCorrupt, match="changed while it was read"):
        objects.upload(source, "blobs/key", state)
    assert objects.size("blobs/key") is None


@pytest.mark.parametrize(
    ("place", "expected"),
    [("/home/me/store", False), ("/mnt/nfs/deep/store", True), ("/mnt/nfs-not", False), ("/mnt/nfs/disk/x", False)],
)
def test_directories_of_other_machines_are_known(tmp_path: Path, place: str, expected: bool) -> None:
    (tmp_path / "mounts").write_text(
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "40 22 0:50 / /mnt/nfs rw,relatime shared:1 - nfs4 server:/export rw,vers=4.2\n"
        "41 40 0:51 / /mnt/nfs/disk rw - xfs /dev/vdb rw\n"
        "42 22 0:52 / /mnt/with\\040blank rw - ext4 /dev/vdc rw\n"
    )
    assert is_on_network(Path(place), tmp_path / "mounts") is expected
    assert not is_on_network(Path(place), tmp_path / "nothing")


def test_copies_are_whole_and_new(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(data)
    assert copy_file(tmp_path / "source", tmp_path / "target") == len(data)
    assert (tmp_path / "target").read_bytes() == data
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "source", tmp_path / "target")
    # A file of the kernel's has no size that could be copied by; reading it tells.
    assert copy_file(Path("/proc/self/status"), tmp_path / "status") == 0


# Object stores


def test_a_server_that_ignores_the_condition_is_noticed(bucket: Bucket, retry: Retry) -> None:
    class Ignoring(BucketFileSystem):
        protocol = ("ignoring", "s3a")

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
            super().pipe_file(path, value)

    fsspec.register_implementation("ignoring", Ignoring, clobber=True)
    objects = RemoteObjects("ignoring://b/store", retry)
    assert objects.create("key", b"first")
    assert not objects.create("key", b"second")
    assert objects.read("key") == b"first"
    assert objects.size(MARKER)


def test_a_server_that_answers_with_an_error_although_it_wrote(bucket: Bucket, retry: Retry) -> None:
    objects = RemoteObjects("bucket://b/store", retry)
    assert objects.create("other", b"")
    answers = iter([ConnectionError("reset")])

    def fail(operation: str, _path: str) -> None:
        if operation == "piped":
            for error in answers:
                raise error

    bucket.fail = fail
    assert objects.create("key", b"mine")
    assert not objects.create("key", b"other")


def test_a_file_server_shows_nothing_half(retry: Retry) -> None:
    register()
    PlainFileSystem.buckets["p"] = place = Bucket()
    objects = RemoteObjects("plain://p/store", retry)
    seen = []
    place.fail = lambda operation, _path: seen.append((operation, place.contents.get("p/store/key")))
    objects.put("key", b"content")
    assert {content for operation, content in seen if operation == "close"} == {None}
    assert place.contents == {"p/store/key": b"content"}


def test_a_listing_of_a_file_server_that_fails_is_no_short_listing(retry: Retry) -> None:
    register()
    PlainFileSystem.buckets["q"] = place = Bucket()
    objects = RemoteObjects("plain://q/store", retry)
    objects.put("folder/deep/key", b"")
    assert [info.key for info in objects.listing("folder")] == ["folder/deep/key"]

    def fail(operation: str, path: str) -> None:
        if operation == "ls" and path.endswith("deep"):
            raise PermissionError(path)

    place.fail = fail
    with pytest.raises(StoreUnavailable, match="cannot list"):
        objects.listing("folder")


@pytest.mark.parametrize("switches", [(first, second) for first in range(7) for second in range(7)])
def test_of_two_that_settle_one_stands(switches: tuple[int, int]) -> None:
    """Two creators whose reads and writes alternate in every way that their waiting allows."""
    contents: dict[str, bytes] = {}
    won: dict[bytes, bool] = {}
    order = threading.Condition()
    at_s = {b"one": switches[0] * 1.0, b"two": switches[1] * 1.0}

    class Creator(threading.Thread):
        def __init__(self, name: bytes) -> None:
            super().__init__()
            self.data = name
            self.now_s = at_s[name]

        def turn(self) -> None:
            """Wait until nobody else is behind in time."""
            with order:
                order.notify_all()
                order.wait_for(lambda: all(other.now_s >= self.now_s for other in creators if other.is_alive()))

        def sleep(self, seconds: float) -> None:
            self.now_s += seconds
            self.turn()

        def run(self) -> None:
            self.turn()

            def read() -> bytes | None:
                found = contents.get("key")
                self.sleep(1.0)  # what the storage takes
                return found

            def put(data: bytes) -> None:
                self.sleep(1.0)
                contents["key"] = data

            won[self.data] = create_by_settling(read, put, self.data, self.sleep, settle_s=3.0)
            self.now_s = float("inf")
            with order:
                order.notify_all()

    creators = [Creator(b"one"), Creator(b"two")]
    for creator in creators:
        creator.start()
    for creator in creators:
        creator.join()
    assert sorted(won.values()) == [False, True]
    assert won[contents["key"]]
