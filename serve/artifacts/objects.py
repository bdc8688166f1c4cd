"""Objects: the port to what keeps bytes under keys, a local directory or an object store. All methods block.

It asks for little, so that every storage can give it: whole objects appear at once or not at all, listings show what
was written before them, or a known time before them, and one operation is exclusive: `create`. There is no rename, and
no lock.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serve.artifacts.file_state import FileState


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing: key, size, and when it was written (seconds since the epoch; None: not known)."""

    key: str
    size_bytes: int
    modified_s: float | None


class Objects(Protocol):
    """Bytes under keys. A key is a relative path with `/`.

    Every method raises `StoreUnavailable` if the storage cannot be reached, or refuses, after it was tried again.
    """

    @property
    def url(self) -> str:
        """Where it is."""

    @property
    def staleness_s(self) -> float:
        """For how long a listing may not show what another machine wrote or removed. An object itself is fresh."""

    def read(self, key: str) -> bytes | None:
        """Return an object; None: there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that must not be there yet; of several callers exactly one succeeds.

        Returns:
            Whether the object has this content now, by this call. A caller whose success was not reported to it, and
            who therefore tried again, succeeds too; so contents that have to differ between callers carry a nonce.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write an object, or overwrite it. The last one wins; no reader sees a mixture."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None: there is none."""

    def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return the objects below `prefix/`, at any depth, ordered by key. Never an old state from a cache."""

    def upload(self, source: Path, key: str, state: FileState) -> None:
        """Write a file's content as an object, or overwrite it, at once visible and complete.

        Raises:
            BundleCorrupt: The file is not in this state any more; there is no object then.
        """

    @property
    def renames(self) -> bool:
        """Whether `ingest` hashes a file while it writes it; else it hashes it first, to know the key."""

    def ingest(self, source: Path, state: FileState, key_of: Callable[[str], str], read: Callable[[int], None]) -> str:
        """Do as `upload`, under a key that follows from the content; return the BLAKE3 of that.

        Args:
            source: The file.
            state: That it is in.
            key_of: Returns the key of a BLAKE3. If there is such an object already, it stays.
            read: Told how many more bytes are done.
        """

    def copy_range(self, key: str, start: int, length: int, descriptor: int) -> int:
        """Write a part of an object into an open file, at the same offset.

        Returns:
            How many bytes there were; fewer than `length` if the object ends before, or is not there.
        """

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return a part of an object; less if it ends before, nothing if it is not there."""


# Network storage answers slowly, and many questions at a time.
_QUESTIONS_AT_ONCE = 16


def read_many(objects: Objects, keys: Sequence[str]) -> dict[str, bytes | None]:
    """Read many objects at a time."""
    if len(keys) < 2:
        return {key: objects.read(key) for key in keys}
    with ThreadPoolExecutor(min(len(keys), _QUESTIONS_AT_ONCE), thread_name_prefix="read") as pool:
        return dict(zip(keys, pool.map(objects.read, keys), strict=True))


def sizes_of(objects: Objects, keys: Sequence[str]) -> dict[str, int | None]:
    """Return the sizes of many objects in bytes; None of those that are not there."""
    if len(keys) < 2:
        return {key: objects.size(key) for key in keys}
    with ThreadPoolExecutor(min(len(keys), _QUESTIONS_AT_ONCE), thread_name_prefix="size") as pool:
        return dict(zip(keys, pool.map(objects.size, keys), strict=True))
