"""What tests of the store are made of: storage in memory, storage that dies, a clock, and small bundles."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from serve.artifacts.blobs import blob_key
from serve.artifacts.clock import Clock
from serve.artifacts.file_copy import write_all
from serve.artifacts.file_state import FileState, check_unchanged
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.manifest import FileEntry
from serve.artifacts.objects import ObjectInfo, Objects

_T = TypeVar("_T")


class Killed(BaseException):
    """The process that did it is gone. No `Exception`: nothing catches the end of a process."""


class FakeTime:
    """Time that passes when somebody sleeps, or the test says so."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        with self._lock:
            self.now_s += seconds

    def clock(self, ahead_s: float = 0.0) -> Clock:
        """Return the clock of a machine whose time of day is ahead by so much."""
        return Clock(lambda: self.now_s + ahead_s, lambda: self.now_s, self.sleep)


class MemoryObjects:
    """Objects in a dictionary, with the guarantees that the port asks for."""

    def __init__(self, time: FakeTime | None = None) -> None:
        self.contents: dict[str, tuple[bytes, float]] = {}
        self.time = time or FakeTime()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return "fake://store"

    @property
    def staleness_s(self) -> float:
        return 0.0

    def read(self, key: str) -> bytes | None:
        found = self.contents.get(key)
        return found[0] if found else None

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            return self.contents.setdefault(key, (data, self.time.now_s))[0] == data

    def put(self, key: str, data: bytes) -> None:
        self.contents[key] = (data, self.time.now_s)

    def delete(self, key: str) -> None:
        self.contents.pop(key, None)

    def size(self, key: str) -> int | None:
        found = self.contents.get(key)
        return len(found[0]) if found else None

    def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
        found = sorted(item for item in list(self.contents.items()) if item[0].startswith(f"{prefix}/"))
        return tuple(ObjectInfo(key, len(data), written_s) for key, (data, written_s) in found)

    def upload(self, source: Path, key: str, state: FileState) -> None:
        data = source.read_bytes()
        check_unchanged(source, state)
        self.put(key, data)

    @property
    def renames(self) -> bool:
        return True

    def ingest(self, source: Path, state: FileState, key_of: Callable[[str], str], read: Callable[[int], None]) -> str:
        data = source.read_bytes()
        digest = blake3(data).hexdigest()
        read(len(data))
        self.upload(source, key_of(digest), state)
        return digest

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        return write_all(descriptor, self.read_range(key, start, length), start)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return (self.read(key) or b"")[start : start + length]


@dataclass
class Step:
    """One operation on storage: which one, on what, and whether it is about to be done or was done."""

    operation: str
    key: str
    done: bool


@dataclass
class WatchedObjects:
    """Objects that tell of each operation, before and after; the one who is told may raise, or do something else."""

    inner: Objects
    watch: Callable[[Step], None] = field(default=lambda _step: None)

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def staleness_s(self) -> float:
        return self.inner.staleness_s

    def read(self, key: str) -> bytes | None:
        return self._do("read", key, lambda: self.inner.read(key))

    def create(self, key: str, data: bytes) -> bool:
        return self._do("create", key, lambda: self.inner.create(key, data))

    def put(self, key: str, data: bytes) -> None:
        self._do("put", key, lambda: self.inner.put(key, data))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self.inner.delete(key))

    def size(self, key: str) -> int | None:
        return self._do("size", key, lambda: self.inner.size(key))

    def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return self._do("listing", prefix, lambda: self.inner.listing(prefix))

    def upload(self, source: Path, key: str, state: FileState) -> None:
        self._do("upload", key, lambda: self.inner.upload(source, key, state))

    @property
    def renames(self) -> bool:
        return self.inner.renames

    def ingest(self, source: Path, state: FileState, key_of: Callable[[str], str], read: Callable[[int], None]) -> str:
        return self._do("ingest", str(source), lambda: self.inner.ingest(source, state, key_of, read))

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        return self._do("copy_range", key, lambda: self.inner.copy_range(key, start, length, descriptor))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._do("read_range", key, lambda: self.inner.read_range(key, start, length))

    def _do(self, operation: str, key: str, action: Callable[[], _T]) -> _T:
        self.watch(Step(operation, key, done=False))
        result = action()
        self.watch(Step(operation, key, done=True))
        return result


class DyingAt:
    """A watcher that kills the process at one step, counted from 0: from then on nothing it does takes place."""

    def __init__(self, step: int) -> None:
        self._left = step
        self._lock = threading.Lock()
        self.happened = False

    def __call__(self, _step: Step) -> None:
        with self._lock:
            self.happened = self.happened or self._left == 0
            self._left -= 1
            if self.happened:
                raise Killed


class DoingAt:
    """A watcher that does something else at one step, counted from 0, before the watched one goes on."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._left = step
        self._action = action
        self._lock = threading.Lock()
        self.happened = False

    def __call__(self, _step: Step) -> None:
        with self._lock:
            self._left -= 1
            if self._left != -1:
                return
            self.happened = True
        self._action()


def bundle_contents(objects: Objects, files: Sequence[FileEntry]) -> dict[str, bytes]:
    """Return what a store has of files; fails if anything is missing or wrong."""
    found = {entry.path: objects.read(blob_key(entry.blake3)) or b"" for entry in files}
    assert {path: blake3(data).hexdigest() for path, data in found.items()} == {e.path: e.blake3 for e in files}
    return found


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    """Write files into a directory; return it."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def read_files(directory: Path) -> dict[str, bytes]:
    """Return all files of a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def print_of(label: str) -> str:
    """Return a fingerprint."""
    return fingerprint(label)


def manifest_fields(label: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of a manifest, but its files."""
    return {
        "fingerprint": print_of(label),
        "name": "model",
        "kind": "transformers-checkpoint",
        "model": {"source": label, "digest": "0", "architecture": "LlamaForCausalLM"},
        "provenance": {"created": "2026-01-01T00:00:00Z", "raytrt": "0"},
        **changes,
    }


def step_fields(label: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of a step's record, but its files."""
    return {"fingerprint": print_of(label), "step": "quantize", "created": "2026-01-01T00:00:00Z", **changes}
