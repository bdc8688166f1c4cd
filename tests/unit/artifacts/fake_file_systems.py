"""File systems of fsspec for tests: an object store, and one that can neither create exclusively nor write at once."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


@dataclass
class Bucket:
    """What a fake file system keeps.

    Attributes:
        contents: By path, without protocol.
        fail: Called before and after each operation with its name and path; raises what the operation fails with.
        read_bytes: How many were read.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    fail: Callable[[str, str], None] = lambda _operation, _path: None
    read_bytes: int = 0


class BucketFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """An object store: whole objects, listings without directories, exclusive creation."""

    protocol: ClassVar[Any] = ("bucket", "s3a")
    cachable = False
    buckets: ClassVar[dict[str, Bucket]] = {}

    def _bucket(self, path: str) -> Bucket:
        return self.buckets.setdefault(path.lstrip("/").split("/")[0], Bucket())

    def _key(self, path: str) -> str:
        return str(self._strip_protocol(path)).strip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("pipe", key)
        if mode == "create" and key in bucket.contents:
            raise OSError(22, "PreconditionFailed")  # as some libraries say it
        bucket.contents[key] = bytes(value)
        bucket.fail("piped", key)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("cat", key)
        if key not in bucket.contents:
            raise FileNotFoundError(path)
        data = bucket.contents[key][start:end]
        bucket.read_bytes += len(data)
        return data

    def rm_file(self, path: str) -> None:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("rm", key)
        if bucket.contents.pop(key, None) is None:
            raise FileNotFoundError(path)
        bucket.fail("removed", key)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("info", key)
        if key in bucket.contents:
            return {"name": key, "size": len(bucket.contents[key]), "type": "file"}
        if any(name.startswith(f"{key}/") for name in bucket.contents):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("find", key)
        entries = sorted(bucket.contents.items())
        return {
            name: {"name": name, "size": len(data), "type": "file", "LastModified": "2026-01-01T00:00:00Z"}
            for name, data in entries
            if name.startswith(f"{key}/")
        }

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        key = self._key(path)
        bucket = self._bucket(key)
        bucket.fail("ls", key)
        found: dict[str, dict[str, Any]] = {}
        for name, data in sorted(bucket.contents.items()):
            if name.startswith(f"{key}/"):
                head, _slash, rest = name[len(key) + 1 :].partition("/")
                kind = "directory" if rest else "file"
                found[head] = {"name": f"{key}/{head}", "size": 0 if rest else len(data), "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else sorted(entry["name"] for entry in found.values())


class _Upload(io.BytesIO):
    """A file that appears in pieces: first empty, then with what was written."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        super().__init__()
        self._bucket = bucket
        self._key = key
        bucket.contents[key] = b""

    def close(self) -> None:
        if not self.closed:
            self._bucket.fail("close", self._key)
            self._bucket.contents[self._key] = self.getvalue()
        super().close()


class PlainFileSystem(BucketFileSystem):
    """A file server: what fsspec does when a file system brings nothing of its own."""

    protocol: ClassVar[Any] = "plain"
    buckets: ClassVar[dict[str, Bucket]] = {}
    pipe_file = AbstractFileSystem.pipe_file
    put_file = AbstractFileSystem.put_file
    find = AbstractFileSystem.find

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        key = self._key(path)
        return io.BytesIO(self.cat_file(path)) if mode == "rb" else _Upload(self._bucket(key), key)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no directories."""

    def mkdirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no directories."""

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        contents = self._bucket(self._key(path1)).contents
        contents[self._key(path2)] = contents[self._key(path1)]

    def mv(self, path1: str, path2: str, *_: Any, **__: Any) -> None:
        contents = self._bucket(self._key(path1)).contents
        contents[self._key(path2)] = contents.pop(self._key(path1))


def register() -> None:
    """Make both known to fsspec; safe to call again."""
    fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
    fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
