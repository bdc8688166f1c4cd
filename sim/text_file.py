"""Lines of trace files, packed or not."""

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from serve.errors import ConfigError


class TraceError(ConfigError):
    """A trace cannot be read; the message gives file, line, reason and remedy."""


def numbered_lines(path: Path, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the first `limit` lines that are not empty, with their numbers from 1. `.xz` and `.gz` are unpacked.

    Raises:
        TraceError: The file cannot be read.
    """
    found = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and found >= limit:
                    return
                if line.strip():
                    found += 1
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise TraceError(f"{path}: cannot be read: {reason}; give a file, plain or packed as .xz or .gz") from None


def _open(path: Path) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".gz":
        return gzip.open(path)
    return path.open("rb")
