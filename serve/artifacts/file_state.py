"""FileState: what tells whether a file is the same as before."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from serve.errors import BundleCorrupt


@dataclass(frozen=True)
class FileState:
    """A file as it is at a moment. A change that leaves mtime as it was still sets ctime, which nobody can set back."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take it from what `stat` says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def check_unchanged(path: Path, state: FileState) -> None:
    """Check that a file's content is what it was a moment ago.

    Its ctime does not count: that changes too when a link to the file is made or removed, as caches do all the time.

    Raises:
        BundleCorrupt: It changed.
    """
    now = FileState.of(path.stat())
    if replace(now, ctime_ns=state.ctime_ns) != state:
        raise BundleCorrupt(f"{path} changed while it was read; whatever writes it has to end first")
