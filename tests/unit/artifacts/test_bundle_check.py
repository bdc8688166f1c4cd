"""Directories that are not what their manifest says are refused, with the file and both sides."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.artifacts.bundle_check import check_bundle, read_manifest, verify_directory
from serve.artifacts.cache_place import PLACE_VARIABLE
from serve.artifacts.manifest import Manifest
from serve.artifacts.parsing import parse_manifest, write_manifest
from serve.artifacts.sealing import seal
from serve.artifacts.store import Store
from serve.errors import BundleCorrupt
from tests.unit.artifacts.fakes import MemoryObjects, manifest_fields, write_files

FILES = {"model/rank0.engine": b"zero", "model/rank1.engine": b"one", "runtime.json": b"{}"}
ENGINE = {"kind": "tensorrt-engine", "parallel": {"tensor": 2}}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = write_files(tmp_path / "bundle", FILES)
    manifest = Store(MemoryObjects()).publish_bundle(manifest_fields("one", **ENGINE), directory)
    (directory / "manifest.json").write_bytes(write_manifest(manifest))
    return directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE_VARIABLE, str(tmp_path / "cache"))


def test_a_good_bundle_is_good(bundle: Path) -> None:
    assert verify_directory(bundle) == check_bundle(bundle)


def change(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def replace_by_link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def replace_folder_by_link(path: Path) -> None:
    path.parent.rename(path.parents[2] / "moved")
    path.parent.symlink_to(path.parents[2] / "moved")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("check", [verify_directory, check_bundle])
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (change, r"model/rank0\.engine has BLAKE3 [0-9a-f]{64}, the manifest says [0-9a-f]{64}"),
        (lambda path: path.write_bytes(b"zer"), r"model/rank0\.engine has 3 bytes, the manifest says 4"),
        (lambda path: path.write_bytes(b"zeroo"), r"model/rank0\.engine has 5 bytes, the manifest says 4"),
        (lambda path: path.unlink(), r"model/rank0\.engine is missing"),
        (lambda path: (path.parent / "more").write_bytes(b""), "model/more is not in the manifest"),
        (replace_by_link, r"model/rank0\.engine is a symbolic link to .*outside"),
        (replace_folder_by_link, "model is a symbolic link to .*moved"),
        (replace_by_pipe, r"model/rank0\.engine is no plain file"),
        (lambda path: (path.parents[1] / "manifest.json").unlink(), r"manifest\.json cannot be read: No such file"),
        (lambda path: (path.parents[1] / "manifest.json").write_bytes(b"{"), "is no manifest of a bundle"),
    ],
)
def test_harm_is_seen(
    bundle: Path, harm: Callable[[Path], object], told: str, check: Callable[[Path], Manifest]
) -> None:
    check(bundle)
    harm(bundle / "model" / "rank0.engine")
    with pytest.raises(BundleCorrupt, match=told):
        check(bundle)


def test_a_change_that_hides_its_time_is_seen(bundle: Path) -> None:
    path = bundle / "model" / "rank0.engine"
    old_ns = time.time_ns() - 10**12
    os.utime(path, ns=(old_ns, old_ns))
    check_bundle(bundle)
    change(path)
    os.utime(path, ns=(old_ns, old_ns))
    with pytest.raises(BundleCorrupt, match="has BLAKE3"):
        check_bundle(bundle)


def edited(bundle: Path, *edits: tuple[str, str]) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    document = json.loads(text)
    del document["checksum"]
    path.write_bytes(seal(document))


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ([("model/rank0.engine", "../../etc/passwd")], "is no path inside the bundle"),
        ([("model/rank0.engine", "/etc/passwd")], "is no path inside the bundle"),
        ([("model/rank0.engine", "model/./rank0.engine")], "is no path inside the bundle"),
        ([("model/rank0.engine", "model/rank1.engine")], "unique and in order"),
        ([("model/rank0.engine", "runtime.json/x"), ("model/rank1.engine", "runtime.json/y")], "unique and in order"),
        ([("runtime.json", "manifest.json")], "unique and in order|cannot list itself"),
        ([('"size_bytes": 4', '"size_bytes": -4')], "greater than or equal to 0"),
        ([('"format_version": 1', '"format_version": 2')], "format_version"),
        ([('"kind": "tensorrt-engine"', '"kind": "tensorrt-engine", "extra": 1')], "no such setting"),
    ],
)
def test_manifests_that_were_tampered_with_are_refused(bundle: Path, edits: list[tuple[str, str]], told: str) -> None:
    edited(bundle, *edits)
    with pytest.raises(BundleCorrupt, match=told):
        verify_directory(bundle)


def test_any_changed_byte_of_a_manifest_is_seen_or_means_the_same(bundle: Path) -> None:
    path = bundle / "manifest.json"
    data, manifest = path.read_bytes(), read_manifest(bundle)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if data[at : at + 1].isspace():
            with suppress(BundleCorrupt):
                assert parse_manifest(changed, "somewhere") == manifest
        else:
            with pytest.raises(BundleCorrupt, match="somewhere"):
                parse_manifest(changed, "somewhere")


def test_a_manifest_that_was_edited_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"tensor": 2', '"tensor": 1'))
    with pytest.raises(BundleCorrupt, match=r"its checksum is blake3:\w+, and that of its content blake3:\w+: it was "):
        verify_directory(bundle)


def test_a_file_that_is_also_a_directory_is_refused() -> None:
    entry = {"size_bytes": 1, "blake3": "0" * 64}
    fields = {**manifest_fields("one"), "files": [{"path": "a", **entry}, {"path": "a/b", **entry}]}
    with pytest.raises(ValueError, match="'a' is a file and a directory"):
        Manifest.model_validate(fields)


def test_a_rank_without_its_engine_is_refused(tmp_path: Path) -> None:
    directory = write_files(tmp_path / "half", {"model/rank0.engine": b"zero"})
    with pytest.raises(BundleCorrupt, match=r"model/rank1\.engine missing: its layout \(tensor=2, pipeline=1\) has 2"):
        Store(MemoryObjects()).publish_bundle(manifest_fields("one", **ENGINE), directory)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="is no manifest"):
        parse_manifest(data, "somewhere")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), name=st.sampled_from(sorted(FILES)))
def test_any_changed_bit_is_seen(bundle: Path, at: int, bit: int, name: str) -> None:
    path = bundle / name
    data = bytearray(FILES[name])
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    for check in (check_bundle, verify_directory):
        with pytest.raises(BundleCorrupt, match="has BLAKE3"):
            check(bundle)
    path.write_bytes(FILES[name])
    check_bundle(bundle)
