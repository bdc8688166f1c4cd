"""Fetch: the source checkpoint, whole and safe to load, on this node."""

from typing import Any

from builders.context import StepContext
from builders.home import digest_database
from builders.source.checkpoint import check_checkpoint
from builders.source.reading import fetch_source, list_source
from serve.artifacts.digests import DigestCache

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Fetch the source, unless it is local, and check it.

    Returns:
        `source`, `revision`, `digest` (of its listing), `architecture`, `parameters`, `size_bytes`, `files` (names).

    Raises:
        ConfigError: It cannot be read, may not be used, or is not whole.
        BuildFailed: It is not what the driver saw.
    """
    progress = context.progress

    def hashed(done: int, total: int) -> None:
        progress(done, total, "reading")

    listing = list_source(context.spec, DigestCache(digest_database()), progress=hashed)
    total = listing.size_bytes
    directory = fetch_source(
        context.spec, listing, context.output, lambda done, name: progress(done, total, f"fetched {name}")
    )
    names = tuple(listing.files)
    found = check_checkpoint(directory, names, listing.where)
    return {
        "source": listing.where,
        "revision": listing.revision,
        "digest": listing.digest,
        "architecture": found.architecture,
        "parameters": found.parameters,
        "size_bytes": total,
        "files": list(names),
    }
