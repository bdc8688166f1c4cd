"""From a specification's `source` to what is in it, and to its files on this node."""

import shutil
from collections.abc import Callable
from pathlib import Path

from builders.home import work_directory
from builders.links import link_or_copy
from builders.settings.source import SourceSettings
from builders.source.hub import fetch_hub, list_hub
from builders.source.listing import SourceListing
from builders.source.local import list_local
from builders.source.location import HubLocation, LocalLocation, UrlLocation, parse_location
from builders.spec import BuildSpec
from serve.artifacts.digests import DigestCache
from serve.artifacts.port import ByteProgress, no_progress

_ANYWHERE = Path("/")  # specifications that reach a node have no relative paths


def list_source(
    spec: BuildSpec, digests: DigestCache, base: Path = _ANYWHERE, progress: ByteProgress = no_progress
) -> SourceListing:
    """List the files of a source that a build takes. Blocks; reads a local source once.

    Args:
        spec: The build.
        digests: Remembers digests of local files.
        base: Directory of the build file.
        progress: Told bytes read of a local source.

    Raises:
        ConfigError: It cannot be read, or holds no checkpoint that may be used.
    """
    allow_code = bool(spec.engine.get("trust_remote_code", False))
    allow_pickle = spec.source.allow_pickle
    match parse_location(spec.source, base):
        case LocalLocation() as local:
            return list_local(
                local, allow_pickle=allow_pickle, allow_code=allow_code, digests=digests, progress=progress
            )
        case HubLocation() as hub:
            return list_hub(hub, allow_pickle=allow_pickle, allow_code=allow_code)
        case UrlLocation() as url:
            # Imported here: fsspec takes a while, and other sources do not need it.
            from builders.source.url import list_url

            return list_url(url, allow_pickle=allow_pickle, allow_code=allow_code)


def pinned_source(source: SourceSettings, listing: SourceListing, base: Path) -> SourceSettings:
    """Return the section as every node reads it in the same way: absolute paths, commits instead of branches."""
    match parse_location(source, base):
        case LocalLocation(directory, None):
            return source.model_copy(update={"location": str(directory)})
        case HubLocation(repository):
            return source.model_copy(update={"location": f"hf://{repository}", "revision": listing.revision})
        case _:
            return source


def local_directory(source: SourceSettings) -> Path | None:
    """Return where a local source lies; None: it has to be fetched."""
    location = parse_location(source, _ANYWHERE)
    return location.directory if isinstance(location, LocalLocation) else None


def fetch_source(spec: BuildSpec, listing: SourceListing, output: Path, progress: Callable[[int, str], None]) -> Path:
    """Bring the files of a source to this node; returns their directory, which is its own for a local source.

    Raises:
        ConfigError: It may not be read.
        Exception: Network or storage failed; worth another try.
    """
    match parse_location(spec.source, _ANYWHERE):
        case LocalLocation(directory):
            return directory
        case HubLocation() as hub:
            fetch_hub(hub, listing, output, progress)
        case UrlLocation() as url:
            from builders.source.url import fetch_url

            # Not in the output, which is gone if this process is killed: the next try goes on with these.
            partial = work_directory() / f"download-{listing.digest[:16]}"
            partial.mkdir(parents=True, exist_ok=True)
            fetch_url(url, listing, partial, progress)
            for name in listing.files:
                link_or_copy(partial / name, output / name)
            shutil.rmtree(partial)
    return output
