"""What is laid out on a node before a step runs there, and removed afterwards. Blocks; knows no Ray."""

import contextlib
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePath

from builders.assemble import assemble, link_tree
from builders.context import StepInput, StepName
from builders.errors import BuildFailed
from builders.home import digest_database, log_file, work_directory
from builders.source.listing import SourceListing
from builders.source.local import read_local
from builders.source.reading import local_directory
from builders.spec import BuildSpec, parse_spec
from builders.step_order import StagedStep, StepOrder
from serve.artifacts.cache_place import PLACE_VARIABLE, cache_root
from serve.artifacts.digests import DigestCache
from serve.artifacts.node_cache import NodeCache
from serve.artifacts.port import ArtifactStore
from serve.artifacts.step_record import StepRecord

_ABANDONED_S = 7 * 86400.0
_WITH_CANDIDATE = frozenset({StepName.TUNE, StepName.VERIFY, StepName.PUBLISH})


def stage(order: StepOrder, store: ArtifactStore) -> StagedStep:
    """Bring what a step needs to this node, and make its directories.

    Args:
        order: The step.
        store: Where inputs are fetched from, unless this node has them.

    Raises:
        BuildFailed: A local source is not the same here.
        BundleCorrupt, StoreUnavailable: An input cannot be had.
    """
    spec = parse_spec(dict(order.spec))
    work = work_directory()
    stem = order.fingerprint[:16]
    root = work / f"{stem}-{order.attempt}"
    _sweep(work, stem, root)
    output, scratch = root / "output", root / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    cache = NodeCache()
    records = {name: StepRecord.model_validate(dict(record)) for name, record in order.inputs.items()}
    inputs = {name: _bring(spec, name, record, root, store, cache) for name, record in records.items()}
    candidate = root / "candidate" if order.step in _WITH_CANDIDATE else None
    if candidate is not None:
        described = {
            name: StepInput(record.fingerprint, inputs[name], record.result, record.seconds)
            for name, record in records.items()
        }
        assemble(spec, described, candidate)
    return StagedStep(
        host=platform.node(),
        root=root,
        output=output,
        scratch=scratch,
        inputs=inputs,
        candidate=candidate,
        user_files=_write_files(order.user_files, root / "files"),
        log=log_file(order.build, order.step.value),
    )


def _sweep(work: Path, stem: str, root: Path) -> None:
    """Remove what tries left whose process was killed: of this step now, of others once nobody will come back."""
    for path in work.glob("*-*"):
        with contextlib.suppress(OSError):
            is_old = time.time() - path.stat().st_mtime > _ABANDONED_S
            if path != root and (path.name.startswith(stem) or is_old):
                shutil.rmtree(path, ignore_errors=True)


def stage_beside(order: StepOrder, staged: StagedStep, store: ArtifactStore) -> StagedStep:
    """Lay out on a further node of a step, at the path of the first; nothing, if the nodes share that directory.

    Raises:
        BuildFailed: The cache of bundles is elsewhere on this node.
    """
    if work_directory() != staged.root.parent:
        raise BuildFailed(
            order.step.value,
            f"the cache of bundles is at {cache_root()} on {platform.node()}, but {staged.root.parent.parent} on "
            f"{staged.host}; the nodes of one engine need it at one path: set {PLACE_VARIABLE} alike",
            mistake=True,
        )
    return staged if staged.root.exists() else stage(order, store)


def clear(staged: StagedStep) -> None:
    """Remove what was laid out. Safe to call twice."""
    shutil.rmtree(staged.root, ignore_errors=True)


def _bring(
    spec: BuildSpec, name: StepName, record: StepRecord, root: Path, store: ArtifactStore, cache: NodeCache
) -> Path:
    local = local_directory(spec.source) if name is StepName.FETCH else None
    if local is not None:
        _check_local(local, record)
        return local
    tree = cache.fetch_step(store, record)
    target = root / "inputs" / name.value
    # Second names, so that the cache may remove its own while the step runs.
    link_tree(tree, target)
    cache.release(tree)
    return target


def _check_local(directory: Path, record: StepRecord) -> None:
    """Check that a source in a directory is what was fetched: another node may have something else there.

    Raises:
        BuildFailed: It is not.
    """
    names = [str(name) for name in record.result["files"]]
    try:
        found = SourceListing(str(directory), read_local(directory, names, DigestCache(digest_database()))).digest
    except OSError as exc:
        found = str(exc)
    if found != record.result["digest"]:
        raise BuildFailed(
            record.step,
            f"{directory} on node {platform.node()} is not what the build began with ({found}); a local source "
            "has to be the same on every node, and to stay as it is while a build runs",
        )


def _write_files(contents: Mapping[str, bytes], target: Path) -> dict[str, Path]:
    written = {}
    for number, (name, content) in enumerate(contents.items()):
        path = target / f"{number}-{PurePath(name).name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[name] = path
    return written
