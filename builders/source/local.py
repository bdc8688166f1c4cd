"""A checkpoint in a directory, which every node sees at the same path. It is not copied; its files' digests are its
identity, computed in parallel and remembered for as long as a file is not touched."""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from builders.source.listing import SourceFile, SourceListing
from builders.source.location import LocalLocation
from builders.source.selection import select_files
from serve.artifacts.digests import DigestCache
from serve.artifacts.port import ByteProgress, no_progress
from serve.errors import ConfigError

_DEPTH = 2  # a layout has files at the top, and some folders of templates


def list_local(
    location: LocalLocation,
    *,
    allow_pickle: bool,
    allow_code: bool,
    digests: DigestCache,
    progress: ByteProgress = no_progress,
) -> SourceListing:
    """List a directory, with the digest of each file that is taken.

    Raises:
        ConfigError: There is no such directory, or it holds no checkpoint; says the remedy.
    """
    directory = location.directory
    if not directory.is_dir():
        raise ConfigError(
            f"source.location: {directory} is no directory on {socket.gethostname()}; a local checkpoint has to be at "
            "the same path on every node, and where the build is started (or give hf://organisation/model)"
        )
    names = {path.relative_to(directory).as_posix() for path in _files(directory, _DEPTH)}
    taken = select_files(names, allow_pickle=allow_pickle, allow_code=allow_code, where=str(location))
    return SourceListing(str(location), read_local(directory, taken, digests, progress))


def read_local(
    directory: Path, names: Sequence[str], digests: DigestCache, progress: ByteProgress = no_progress
) -> dict[str, SourceFile]:
    """Return size and digest of files of a directory.

    Raises:
        OSError: One is not there.
    """
    found = digests.digests([directory / name for name in names], progress)
    return {name: SourceFile((directory / name).stat().st_size, f"blake3:{found[directory / name]}") for name in names}


def _files(directory: Path, depth: int) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_file():  # a hub's cache has symbolic links, which are followed
            yield path
        elif depth > 1 and path.is_dir() and not path.name.startswith("."):
            yield from _files(path, depth - 1)
