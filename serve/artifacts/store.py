"""Store: the one adapter of the `ArtifactStore` port, over any `Objects`. `open_store` opens one by its URL.

blobs/<2 digits>/<BLAKE3>           file contents
bundles/<fingerprint>.json          manifests
steps/<fingerprint>.json            records of steps
builds/<key>.json                   which bundle a build led to
names/<name>/versions/<n>.json      versions
names/<name>/aliases/<alias>/<n>.json   moves of aliases
locks/, uses/, pending/             leases
tmp/                                what is being written (directories only)
store.json                          what exclusive creation was tried on (object stores only)
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serve.artifacts.blobs import blob_key, missing_blobs
from serve.artifacts.bundle_layout import check_ranks
from serve.artifacts.clock import Clock
from serve.artifacts.collection import BUILDS, Collector
from serve.artifacts.damage import DamagedFile, find_damage
from serve.artifacts.digests import DigestCache
from serve.artifacts.fingerprint import is_fingerprint
from serve.artifacts.json_object import read_json, write_json
from serve.artifacts.leases import Leases
from serve.artifacts.local_objects import LocalObjects
from serve.artifacts.manifest import FileEntry, Manifest
from serve.artifacts.marking import KeepRules
from serve.artifacts.materialization import materialize
from serve.artifacts.names import Names
from serve.artifacts.objects import Objects
from serve.artifacts.parsing import parse_manifest
from serve.artifacts.port import AliasMove, ByteProgress, Collected, Lock, Version, no_progress
from serve.artifacts.publication import BUNDLES, STEPS, Publisher
from serve.artifacts.reference import BundleReference
from serve.artifacts.resolution import resolve
from serve.artifacts.roots import Roots
from serve.artifacts.sealing import unseal
from serve.artifacts.step_record import StepRecord
from serve.artifacts.uses import Uses
from serve.core.strict_model import describe_mistakes
from serve.errors import BundleCorrupt, ConfigError, StoreUnavailable

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=BaseModel)


def open_store(url: str, digests: DigestCache | None = None) -> "Store":
    """Open a store; it need not exist yet.

    Args:
        url: A directory (`~` is the user's), `file://...`, or any URL that fsspec knows.
        digests: Remembers digests of published files; None: for this object's life.

    Raises:
        ConfigError: There is no such protocol, or its package is not installed.
    """
    return Store(open_objects(url), digests)


def open_objects(url: str) -> Objects:
    """Open what keeps a store's bytes."""
    protocol, separator, path = url.partition("://")
    if not separator or protocol in ("file", "local"):
        directory = Path(path if separator else url).expanduser().absolute()
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"store: {directory} is a file; name a directory, which need not exist yet")
        return LocalObjects(directory)
    # Imported here: fsspec takes a while, and a directory needs none of it.
    from serve.artifacts.remote_objects import RemoteObjects

    try:
        return RemoteObjects(url)
    except OSError as exc:  # some file systems connect as soon as they are made
        raise StoreUnavailable(f"store {url} cannot be reached: {exc}") from exc


class Store:
    """A store of bundles, steps and names.

    Args:
        objects: What keeps its bytes.
        digests: Of files that are published.
        clock: Time.
    """

    def __init__(self, objects: Objects, digests: DigestCache | None = None, clock: Clock | None = None) -> None:
        self._objects = objects
        self._clock = clock or Clock()
        self._leases = Leases(objects, self._clock)
        self._roots = Roots(objects, self._clock, self._leases)
        self._uses = Uses(objects, self._clock)
        self._names = Names(objects, self._clock, self._protect, self._is_whole)
        self._publisher = Publisher(objects, self._roots, digests or DigestCache())
        self._collector = Collector(objects, self._clock, self._leases, self._roots, self._names, self._uses)

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process goes the address: connections, threads and databases stay here.
        return open_store, (self.url,)

    @property
    def url(self) -> str:
        """Where it is."""
        return self._objects.url

    @property
    def objects(self) -> Objects:
        """What keeps its bytes; for the cache of a node."""
        return self._objects

    # Bundles and steps

    def find_bundle(self, fingerprint: str) -> Manifest | None:
        """Return a published bundle's manifest; None: there is none."""
        if not is_fingerprint(fingerprint):
            return None
        key = f"{BUNDLES}/{fingerprint}.json"
        data = self._objects.read(key)
        return None if data is None else parse_manifest(data, f"{self.url}/{key}", fingerprint)

    def find_whole_bundle(self, fingerprint: str) -> Manifest | None:
        """Return the manifest of a bundle whose contents are there; None: it has to be made, perhaps again."""
        try:
            manifest = self.find_bundle(fingerprint)
        except BundleCorrupt as exc:
            _log.warning("%s", exc)
            return None
        if manifest is not None and (missing := missing_blobs(self._objects, manifest.files)):
            _log.warning(
                "%s: bundle %s is of no use: %s is missing or cut off", self.url, fingerprint[:12], missing[0].path
            )
            return None
        return manifest

    def find_step(self, fingerprint: str) -> StepRecord | None:
        """Return the record of a finished step; None: there is none that can be read and whose files are there."""
        if not is_fingerprint(fingerprint):
            return None
        key = f"{STEPS}/{fingerprint}.json"
        if self._objects.size(key) is None:
            return None
        # A collection that began before the caller took its lock may be removing it.
        self._roots.settle()
        data = self._objects.read(key)
        if data is None:
            return None
        try:
            record = StepRecord.model_validate(unseal(data))
        except ValueError as exc:  # a ValidationError is one
            _log.warning("%s/%s cannot be read, so the step is done again: %s", self.url, key, exc)
            return None
        if record.fingerprint != fingerprint or missing_blobs(self._objects, record.files):
            _log.warning("%s/%s: contents are missing, so the step is done again", self.url, key)
            return None
        return record

    def bundles(self) -> tuple[str, ...]:
        """Return the fingerprints of all bundles, in order."""
        keys = (info.key.rpartition("/")[2].removesuffix(".json") for info in self._objects.listing(BUNDLES))
        return tuple(sorted(filter(is_fingerprint, keys)))

    def publish_bundle(
        self, manifest: Mapping[str, Any], directory: Path, progress: ByteProgress = no_progress
    ) -> Manifest:
        """Store a bundle's files, then its manifest, at once visible and complete. The first publisher wins."""
        fingerprint = _fingerprint_of(manifest)

        def make(files: tuple[FileEntry, ...]) -> Manifest:
            made = _validated(Manifest, {**manifest, "files": files})
            check_ranks(made)
            return made

        return self._publisher.publish(
            f"{BUNDLES}/{fingerprint}.json", make, lambda: self.find_whole_bundle(fingerprint), directory, progress
        )

    def publish_step(
        self, record: Mapping[str, Any], directory: Path, progress: ByteProgress = no_progress
    ) -> StepRecord:
        """Store a step's output in the same way; `record` has the fields of `StepRecord` without `files`."""
        fingerprint = _fingerprint_of(record)
        return self._publisher.publish(
            f"{STEPS}/{fingerprint}.json",
            lambda files: _validated(StepRecord, {**record, "files": files}),
            lambda: self.find_step(fingerprint),
            directory,
            progress,
        )

    def materialize(self, files: Sequence[FileEntry], directory: Path, progress: ByteProgress = no_progress) -> None:
        """Write files into a directory of this node, each checked; parallel, and resumed where it was broken off."""
        materialize(self._objects, files, directory, progress)

    def find_damage(self, files: Sequence[FileEntry], progress: ByteProgress = no_progress) -> tuple[DamagedFile, ...]:
        """Read the contents of files in the store; return those that are missing or wrong."""
        return find_damage(self._objects, files, progress)

    def remove_damage(self, damaged: Sequence[DamagedFile]) -> None:
        """Remove contents that `find_damage` found, so that publishing them again stores them again."""
        for digest in {file.entry.blake3 for file in damaged}:
            self._objects.delete(blob_key(digest))

    def find_build(self, key: str) -> str | None:
        """Return the fingerprint that a build with this key led to, if its bundle is still there."""
        if not is_fingerprint(key):
            return None
        record = read_json(self._objects.read(f"{BUILDS}/{key}.json")) or {}
        fingerprint = record.get("fingerprint")
        return fingerprint if isinstance(fingerprint, str) and self._has_bundle(fingerprint) else None

    def record_build(self, key: str, fingerprint: str) -> None:
        """Remember what a build led to."""
        if not is_fingerprint(key) or not is_fingerprint(fingerprint):
            raise ValueError(f"{key=} and {fingerprint=} have to be fingerprints")
        self._objects.put(
            f"{BUILDS}/{key}.json", write_json({"fingerprint": fingerprint, "created": self._clock.iso()})
        )

    # Names

    def names(self) -> tuple[str, ...]:
        """Return the names that have versions, in order."""
        return self._names.names()

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return the versions of a name, oldest first; the bundles of old ones may have been collected."""
        return self._names.versions(name)

    def add_version(self, name: str, fingerprint: str, note: str = "") -> Version:
        """Add a version; if the newest one is this bundle already, return that."""
        return self._names.add_version(name, fingerprint, note)

    def aliases(self, name: str) -> Mapping[str, AliasMove]:
        """Return where the aliases of a name point; `latest` is not among them."""
        return self._names.aliases(name)

    def history(self, name: str, alias: str) -> tuple[AliasMove, ...]:
        """Return the moves of an alias, oldest first."""
        return self._names.history(name, alias)

    def resolve(self, reference: BundleReference) -> Manifest:
        """Find the bundle that a reference means."""
        return resolve(self, reference)

    def move_alias(
        self, name: str, alias: str, fingerprint: str, *, reason: str = "", rejected: str | None = None
    ) -> AliasMove:
        """Point an alias, new or old, to a version of the name."""
        return self._names.move_alias(name, alias, fingerprint, reason=reason, rejected=rejected)

    def roll_back(self, name: str, alias: str, *, reason: str, rejected: str | None = None) -> AliasMove:
        """Point an alias to the newest bundle of its history that is neither where it points now, nor was rejected."""
        return self._names.roll_back(name, alias, reason=reason, rejected=rejected)

    # Leases

    def lock(
        self, key: str, holder: str, *, lease_s: float = 30.0, wait: Callable[[str], None] | None = None
    ) -> AbstractContextManager[Lock]:
        """Take a lock. While somebody else holds it, wait, and tell `wait` who does; a holder that died loses it."""
        return self._leases.lock(key, holder, lease_s, wait)

    def use(self, fingerprint: str, holder: str, lease_s: float = 3600.0) -> None:
        """Say that a deployment uses a bundle, or a build a step, until the lease ends or is renewed."""
        if not is_fingerprint(fingerprint):
            raise ConfigError(f"{fingerprint!r} is no fingerprint of a bundle or step")
        if self._uses.renew(fingerprint, holder, lease_s):
            return
        self._roots.settle()
        # Once more: a collection that saw an older lease, which had ended, may have removed it just now.
        self._uses.renew(fingerprint, holder, lease_s)
        if not self._has_bundle(fingerprint) and self._objects.size(f"{STEPS}/{fingerprint}.json") is None:
            raise ConfigError(f"{self.url}: {fingerprint} is no bundle or step of this store; a collection removed it")

    def holders(self, fingerprint: str) -> tuple[str, ...]:
        """Return who uses a bundle or step."""
        return self._uses.holders(fingerprint)

    def collect(
        self,
        *,
        keep_versions: int = 5,
        keep_steps_s: float = 7 * 86400.0,
        grace_s: float = 3600.0,
        dry_run: bool = False,
    ) -> Collected:
        """Remove what nobody needs; see the port."""
        return self._collector.collect(KeepRules(keep_versions, keep_steps_s, grace_s), dry_run=dry_run)

    def _has_bundle(self, fingerprint: str) -> bool:
        return self._objects.size(f"{BUNDLES}/{fingerprint}.json") is not None

    def _is_whole(self, fingerprint: str) -> bool:
        return self.find_whole_bundle(fingerprint) is not None

    @contextmanager
    def _protect(self, fingerprint: str) -> Iterator[None]:
        with self._roots.pending(fingerprint) as pending:
            pending.write(())
            pending.settle()
            if not self._has_bundle(fingerprint):
                raise ConfigError(
                    f"{self.url}: there is no bundle {fingerprint}; it was never published here, or a collection "
                    "removed it: build it again"
                )
            yield


def _fingerprint_of(record: Mapping[str, Any]) -> str:
    value = record.get("fingerprint")
    if not isinstance(value, str) or not is_fingerprint(value):
        raise ConfigError(f"fingerprint: {value!r} is none; it has 64 hexadecimal digits")
    return value


def _validated(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, model.__name__)) from None
