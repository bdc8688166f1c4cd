"""SourceListing: the files of a source checkpoint that a build takes, and what tells their content."""

from collections.abc import Mapping
from dataclasses import dataclass

from serve.artifacts.fingerprint import fingerprint


@dataclass(frozen=True)
class SourceFile:
    """One file: its size, and what changes with its content (a digest, a hub's blob, an object store's ETag)."""

    size_bytes: int
    content: str


@dataclass(frozen=True)
class SourceListing:
    """What is taken of a source.

    Attributes:
        where: For messages.
        files: By path, relative, with `/`.
        revision: Commit of a hub's model.
    """

    where: str
    files: Mapping[str, SourceFile]
    revision: str | None = None

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def digest(self) -> str:
        """Fingerprint of what is in the files, wherever they are."""
        return fingerprint({path: file.content for path, file in self.files.items()})

    def __str__(self) -> str:
        at = f" at {self.revision[:12]}" if self.revision else ""
        return f"{self.where}{at}: {len(self.files)} files, {self.size_bytes / 1e9:.3g} GB"
