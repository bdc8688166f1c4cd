"""Digests of files: right, and remembered only as long as they are."""

import os
import time
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.artifacts.digests import DigestCache, hash_file, tree_digest
from serve.artifacts.file_scan import scan_directory
from serve.artifacts.file_state import FileState
from serve.errors import BundleCorrupt
from tests.unit.artifacts.fakes import write_files

LATER_NS = 3600 * 10**9


def later() -> int:
    """Return the time, an hour ahead: every file changed long ago."""
    return time.time_ns() + LATER_NS


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.sqlite"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.binary(max_size=1000), times=st.sampled_from([1, 10_000]))
def test_a_digest_is_blake3(tmp_path: Path, data: bytes, times: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(data * times)
    assert hash_file(path) == blake3(data * times).hexdigest()


def test_a_known_file_is_not_read_again(tmp_path: Path, database: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    first = DigestCache(database, later)
    assert first.digest(path) == blake3(b"content").hexdigest()
    first.record(FileState.of(path.stat()), "f" * 64)
    link = tmp_path / "link"
    assert DigestCache(database, later).digest(path) == "f" * 64  # another process: from the database
    os.link(path, link)  # which changes ctime
    assert DigestCache(database, later).digest(link) == blake3(b"content").hexdigest()
    assert DigestCache(database, later).digest(path) == blake3(b"content").hexdigest()


def test_what_changed_just_now_is_not_remembered(tmp_path: Path, database: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    cache = DigestCache(database)
    cache.digest(path)
    assert cache.lookup(FileState.of(path.stat())) is None


@pytest.mark.parametrize("keep_mtime", [True, False])
def test_a_change_is_seen(tmp_path: Path, database: Path, keep_mtime: bool) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    cache = DigestCache(database, later)
    cache.digest(path)
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock ticks
        path.write_bytes(b"CONTENT")
    if keep_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.digest(path) == blake3(b"CONTENT").hexdigest()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"x" * 100}).iterdir()

    def read(_count: int) -> None:
        path.write_bytes(b"y")

    with pytest.raises(BundleCorrupt, match="changed while it was read"):
        DigestCache().digest(path, read)


def test_a_link_that_is_made_meanwhile_is_no_change(tmp_path: Path, database: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    cache = DigestCache(database, later)
    assert cache.digest(path, lambda _: os.link(path, tmp_path / "link")) == blake3(b"content").hexdigest()
    assert cache.lookup(FileState.of(path.stat())) is None  # it was not seen in this state


def test_many_files_at_once_with_progress(tmp_path: Path, database: Path) -> None:
    directory = write_files(tmp_path / "files", {f"{number}": bytes([number]) * number for number in range(50)})
    paths = sorted(directory.iterdir())
    cache = DigestCache(database, later)
    for _ in range(2):  # the second time from the database
        seen: list[tuple[int, int]] = []
        digests = cache.digests(paths, lambda *done, seen=seen: seen.append(done))
        assert digests == {path: blake3(path.read_bytes()).hexdigest() for path in paths}
        assert max(seen) == (1225, 1225)


def test_a_damaged_database_is_begun_anew(tmp_path: Path, database: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    database.parent.mkdir()
    database.write_bytes(b"no database at all" * 1000)
    assert DigestCache(database, later).digest(path) == blake3(b"content").hexdigest()
    assert DigestCache(database, later).lookup(FileState.of(path.stat())) is not None


def test_a_database_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (path,) = write_files(tmp_path / "files", {"a": b"content"}).iterdir()
    (tmp_path / "file").write_bytes(b"")
    assert DigestCache(tmp_path / "file" / "digests.sqlite").digest(path) == blake3(b"content").hexdigest()


def test_the_digest_of_a_directory_is_of_names_and_contents(tmp_path: Path) -> None:
    files = {"a": b"1", "folder/b": b"2"}
    digest = tree_digest(write_files(tmp_path / "one", files))
    assert tree_digest(write_files(tmp_path / "two", files)) == digest
    for number, other in enumerate(({"a": b"1", "folder/c": b"2"}, {"a": b"2", "folder/b": b"2"}, {"a": b"1"})):
        assert tree_digest(write_files(tmp_path / f"other-{number}", other)) != digest


def test_directories_are_listed_in_order_without_empty_ones(tmp_path: Path) -> None:
    write_files(tmp_path / "files", {"b": b"1", "a/c": b"22", "a.d": b""})
    (tmp_path / "files" / "empty" / "deep").mkdir(parents=True)
    found = scan_directory(tmp_path / "files")
    assert [(file.relative, file.size_bytes) for file in found] == [("a.d", 0), ("a/c", 2), ("b", 1)]


@pytest.mark.parametrize("name", [b"new\nline", b"col:on", b"back\\slash", b"\xff\xfe"])
def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path, name: bytes) -> None:
    with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
        pass
    with pytest.raises(BundleCorrupt, match="cannot hold the file name"):
        scan_directory(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleCorrupt, match="is no directory"):
        scan_directory(tmp_path / "nothing")
