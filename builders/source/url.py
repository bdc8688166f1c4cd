"""A checkpoint at an fsspec URL: what is there, and its download."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from builders.source.listing import SourceFile, SourceListing
from builders.source.location import UrlLocation
from builders.source.selection import select_files
from serve.errors import ConfigError

# What changes with an object's content, best first, as the storages of fsspec tell it.
_CONTENT_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "md5",
    "crc32c",
    "checksum",
    "mtime",
    "LastModified",
    "created",
)
_AT_ONCE = 8


def list_url(location: UrlLocation, *, allow_pickle: bool, allow_code: bool) -> SourceListing:
    """List a directory.

    Raises:
        ConfigError: It cannot be read, or holds no checkpoint; says the remedy.
    """
    storage, root = _open(location)
    try:
        found: Mapping[str, Mapping[str, Any]] = storage.find(root, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as exc:  # each storage has its own
        raise ConfigError(
            f"source.location: {location} cannot be read ({type(exc).__name__}: {exc}); check the URL and the "
            "credentials"
        ) from exc
    prefix = root.strip("/") + "/"
    files = {path.strip("/").removeprefix(prefix): _file(info) for path, info in found.items()}
    if not files:
        raise ConfigError(f"source.location: there is nothing at {location}; check the URL")
    names = select_files(files, allow_pickle=allow_pickle, allow_code=allow_code, where=str(location))
    return SourceListing(str(location), {name: files[name] for name in names})


def fetch_url(
    location: UrlLocation, listing: SourceListing, output: Path, progress: Callable[[int, str], None]
) -> None:
    """Download what was listed into `output`; files that are there in full already are kept.

    Args:
        location: The directory.
        listing: Of it.
        output: A directory.
        progress: Told bytes that are done, and what is next.

    Raises:
        Exception: The storage failed; worth another try.
    """
    storage, root = _open(location)

    def fetch(name: str) -> str:
        target, size = output / name, listing.files[name].size_bytes
        if not (target.is_file() and target.stat().st_size == size):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            storage.get_file(f"{root.rstrip('/')}/{name}", str(part))
            if part.stat().st_size != size:
                raise OSError(f"{location}/{name} has {part.stat().st_size} bytes, and should have {size}")
            part.rename(target)
        return name

    done = 0
    by_size = sorted(listing.files, key=lambda name: -listing.files[name].size_bytes)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name in pool.map(fetch, by_size):
            done += listing.files[name].size_bytes
            progress(done, name)


def _open(location: UrlLocation) -> tuple[Any, str]:
    try:
        storage, root = fsspec.core.url_to_fs(location.url)
    except ImportError as exc:
        raise ConfigError(f"source.location: {location}: {exc}") from None
    except ValueError as exc:
        raise ConfigError(f"source.location: {location}: {exc}; use a URL that fsspec knows") from None
    return storage, str(root)


def _file(info: Mapping[str, Any]) -> SourceFile:
    content = next((f"{key}:{info[key]}" for key in _CONTENT_KEYS if info.get(key) is not None), "")
    return SourceFile(int(info.get("size") or 0), f"{content}:{info.get('size')}")
