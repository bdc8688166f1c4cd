"""Which files a directory holds: plain files only, by paths that every node can have."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from serve.artifacts.manifest import FileEntry
from serve.errors import BundleCorrupt

# Of a file that was not read.
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class FoundFile:
    """A file: its path relative to the directory, with `/`; where it is; and its size in bytes."""

    relative: str
    path: Path
    size_bytes: int


def scan_directory(directory: Path) -> tuple[FoundFile, ...]:
    """List the files below a directory, ordered by path. Empty directories are passed over.

    Raises:
        BundleCorrupt: It is no directory, or something in it is no plain file (a symbolic link, a device, ...), or has
            a name that a manifest cannot hold.
    """
    if not directory.is_dir():
        raise BundleCorrupt(f"{directory} is no directory")
    found = []
    for parent, folders, names in os.walk(directory, followlinks=False):
        for name in (*folders, *names):
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            relative = path.relative_to(directory).as_posix()
            if stat.S_ISLNK(status.st_mode):
                raise BundleCorrupt(
                    f"{directory}: {relative} is a symbolic link to {os.readlink(path)}; a bundle holds plain files "
                    "only, copy the file"
                )
            if not stat.S_ISREG(status.st_mode):
                raise BundleCorrupt(f"{directory}: {relative} is no plain file; remove it")
            found.append(FoundFile(_checked(directory, relative), path, status.st_size))
    return tuple(sorted(found, key=lambda file: file.relative))


def _checked(directory: Path, relative: str) -> str:
    try:
        relative.encode()  # a name that is no UTF-8 cannot be written into a manifest
        FileEntry(path=relative, size_bytes=0, blake3=NO_DIGEST)
    except (UnicodeEncodeError, ValidationError):
        raise BundleCorrupt(f"{directory}: a manifest cannot hold the file name {relative!r}; rename it") from None
    return relative
