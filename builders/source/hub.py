"""A model of the Hugging Face hub: what is in it, and its download. huggingface_hub is imported when it is needed."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from builders.links import link_or_copy
from builders.source.listing import SourceFile, SourceListing
from builders.source.location import HubLocation
from builders.source.selection import select_files
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_AT_ONCE = 4  # files; each is fetched over several connections where the hub offers it


def list_hub(location: HubLocation, *, allow_pickle: bool, allow_code: bool) -> SourceListing:
    """Ask the hub what a model holds; without a network, look what of it was downloaded before.

    Raises:
        ConfigError: There is no such model, it may not be read, or the hub cannot be reached; says the remedy.
    """
    errors = _library().errors
    try:
        files, commit = _ask_hub(location)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise _refused(location, exc) from exc
    except Exception as exc:  # of several HTTP libraries, by version
        found = _look_into_cache(location)
        if found is None:
            raise ConfigError(
                f"source.location: the hub cannot be asked for {location} ({_reason(exc)}), and it was not downloaded "
                "here before. On a machine with a network run `hf download "
                f"{location.repository} --local-dir DIRECTORY`, bring it here, and give that directory; HF_ENDPOINT "
                "names a mirror"
            ) from exc
        logger.warning("The hub cannot be asked for %s (%s); what was downloaded before is used.", location, exc)
        files, commit = found
    names = select_files(files, allow_pickle=allow_pickle, allow_code=allow_code, where=str(location))
    return SourceListing(str(location), {name: files[name] for name in names}, commit)


def fetch_hub(
    location: HubLocation, listing: SourceListing, output: Path, progress: Callable[[int, str], None]
) -> None:
    """Download what was listed into the hub's own cache, where it goes on after a break, and link it into `output`.

    Args:
        location: Of the model.
        listing: Of it; its revision is what is fetched.
        output: A directory.
        progress: Told bytes that are done, and what is next.

    Raises:
        ConfigError: It may not be read.
        Exception: The network failed; worth another try.
    """
    library = _library()

    def fetch(name: str) -> tuple[str, Path]:
        try:
            path = library.hf_hub_download(location.repository, name, revision=listing.revision)
        except (library.errors.RepositoryNotFoundError, library.errors.RevisionNotFoundError) as exc:
            raise _refused(location, exc) from exc
        return name, Path(path).resolve()

    done = 0
    by_size = sorted(listing.files, key=lambda name: -listing.files[name].size_bytes)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, path in pool.map(fetch, by_size):
            link_or_copy(path, output / name)
            done += listing.files[name].size_bytes
            progress(done, name)


def _ask_hub(location: HubLocation) -> tuple[dict[str, SourceFile], str]:
    info = (
        _library()
        .HfApi()
        .model_info(location.repository, revision=location.revision, files_metadata=True, timeout=_TIMEOUT_S)
    )
    files = {}
    for sibling in info.siblings or ():
        content = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        files[str(sibling.rfilename)] = SourceFile(int(sibling.size or 0), str(content))
    return files, str(info.sha)


def _look_into_cache(location: HubLocation) -> tuple[dict[str, SourceFile], str] | None:
    library = _library()
    try:
        repositories = library.scan_cache_dir().repos
    except library.errors.CacheNotFound:
        return None
    cached = [
        revision
        for repository in repositories
        if repository.repo_type == "model" and repository.repo_id == location.repository
        for revision in repository.revisions
    ]
    wanted = location.revision or "main"
    named = [revision for revision in cached if wanted == revision.commit_hash or wanted in revision.refs]
    # What was fetched by its commit carries no name of a branch.
    found = named or (cached if location.revision is None and len(cached) == 1 else [])
    if not found:
        return None
    root = Path(found[0].snapshot_path)
    # A cached file's blob is named after what the hub tells of its content.
    return {
        Path(file.file_path).relative_to(root).as_posix(): SourceFile(int(file.size_on_disk), Path(file.blob_path).name)
        for file in found[0].files
    }, str(found[0].commit_hash)


def _refused(location: HubLocation, exc: Exception) -> ConfigError:
    if type(exc).__name__ == "GatedRepoError":
        return ConfigError(
            f"source.location: {location} is gated: accept its licence on the hub, and give a token of that account "
            "(`hf auth login`, or HF_TOKEN) on every node"
        )
    if type(exc).__name__ == "RevisionNotFoundError":
        return ConfigError(
            f"source.revision: {location.repository} has no revision {location.revision!r}; give a branch, a tag or a "
            "commit of it"
        )
    return ConfigError(
        f"source.location: the hub has no model {location.repository!r}, or it is private; check the spelling, or give "
        "a token that may read it (`hf auth login`, or HF_TOKEN)"
    )


def _reason(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:200]}" if lines else type(exc).__name__


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ConfigError(
            "source.location: models of a hub need huggingface_hub, which is not installed; pip install 'raytrt[build]'"
        ) from None
    return huggingface_hub
