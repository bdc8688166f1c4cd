"""ArtifactStore: the port through which builders publish bundles and replicas find them. All methods block.

What is stored
- blobs: file contents by their digest, each once, however many bundles and steps share it;
- bundles: a manifest each, by fingerprint, written when all its blobs are there, and never changed;
- steps: a record each, in the same way;
- names: versions (1, 2, ... of a fingerprint each) and aliases with their history;
- locks and uses: leases with an expiry time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.artifacts.manifest import FileEntry, Manifest
from serve.artifacts.reference import BundleReference
from serve.artifacts.step_record import StepRecord

# (bytes done, bytes in all); called from any thread, often
ByteProgress = Callable[[int, int], None]


def no_progress(_done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Version:
    """One version of a name: number, bundle, when it was published (ISO 8601, UTC), and the publisher's note."""

    number: int
    fingerprint: str
    created: str
    note: str = ""


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias; the last one counts.

    Attributes:
        fingerprint: Where it points since then.
        created: When, ISO 8601, UTC.
        reason: Who or what moved it, and why.
        rejected: Bundle that it was rolled back from, because it failed; replicas do not try that one again.
    """

    fingerprint: str
    created: str
    reason: str = ""
    rejected: str | None = None


@dataclass(frozen=True)
class Collected:
    """What a garbage collection removed, or would remove: fingerprints of bundles and steps, blobs, bytes."""

    bundles: tuple[str, ...]
    steps: tuple[str, ...]
    blobs: int
    size_bytes: int


class Lock(Protocol):
    """A build-once lock that this process holds; renewed in the background until it is released."""

    @property
    def lost(self) -> bool:
        """Whether somebody else took it, because this process did not renew it in time. Then stop, publish nothing."""

    def release(self) -> None:
        """Give it back; safe to call twice."""


class ArtifactStore(Protocol):
    """A store of bundles, at one URL."""

    @property
    def url(self) -> str:
        """Where it is."""

    # Bundles and steps

    def find_bundle(self, fingerprint: str) -> Manifest | None:
        """Return a published bundle's manifest; None: there is none.

        Raises:
            BundleCorrupt: What is there is no manifest.
        """

    def find_whole_bundle(self, fingerprint: str) -> Manifest | None:
        """Return the manifest of a bundle whose contents are there, too; None: it is not, so that it has to be made.

        Contents are known by their sizes here: whoever reads them checks every byte.
        """

    def find_step(self, fingerprint: str) -> StepRecord | None:
        """Return the record of a finished step; None: there is none that can be read, so that it has to be made.

        While the caller holds a lock, no collection removes it any more. Waits for one that is running.
        """

    def publish_bundle(
        self, manifest: Mapping[str, Any], directory: Path, progress: ByteProgress = no_progress
    ) -> Manifest:
        """Store a bundle's files, then its manifest, at once visible and complete. The first publisher wins.

        Args:
            manifest: Fields of `Manifest`, without `files`.
            directory: Files of the bundle; read, and left alone. Symbolic links in it are refused.
            progress: Is told.

        Returns:
            The manifest that is in the store now: this one, or the one that was there before.
        """

    def publish_step(
        self, record: Mapping[str, Any], directory: Path, progress: ByteProgress = no_progress
    ) -> StepRecord:
        """Store a step's output in the same way; `record` has the fields of `StepRecord` without `files`."""

    def materialize(self, files: Sequence[FileEntry], directory: Path, progress: ByteProgress = no_progress) -> None:
        """Write files into a directory of this node, each checked; parallel, and resumed where it was broken off.

        Raises:
            BundleCorrupt: A blob is missing, too short or too long, or has another digest.
        """

    def find_build(self, key: str) -> str | None:
        """Return the fingerprint that a build with this key led to, if its bundle is still there."""

    def record_build(self, key: str, fingerprint: str) -> None:
        """Remember what a build led to.

        Args:
            key: A fingerprint of all that the builder knows before the first step: specification, sources, versions.
            fingerprint: Of the bundle.
        """

    # Names

    def names(self) -> tuple[str, ...]:
        """Return the names that have versions, in order."""

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return the versions of a name, oldest first."""

    def add_version(self, name: str, fingerprint: str, note: str = "") -> Version:
        """Add a version; if the newest one is this bundle already, return that."""

    def aliases(self, name: str) -> Mapping[str, AliasMove]:
        """Return where the aliases of a name point; `latest` is not among them."""

    def history(self, name: str, alias: str) -> tuple[AliasMove, ...]:
        """Return the moves of an alias, oldest first."""

    def resolve(self, reference: BundleReference) -> Manifest:
        """Find the bundle that a reference means.

        Raises:
            ConfigError: There is no such name, version, alias or fingerprint; lists what there is.
        """

    def move_alias(
        self, name: str, alias: str, fingerprint: str, *, reason: str = "", rejected: str | None = None
    ) -> AliasMove:
        """Point an alias, new or old, to a version of the name. Of two movers at once both moves are kept, in order.

        Raises:
            ConfigError: It is no version of the name, or `latest`, which moves by itself.
        """

    def roll_back(self, name: str, alias: str, *, reason: str, rejected: str | None = None) -> AliasMove:
        """Point an alias to the newest bundle of its history that is neither where it points now, nor was rejected.

        With `rejected`, nothing happens if the alias points elsewhere already; the last move is returned.

        Raises:
            ConfigError: There is none.
        """

    # Leases

    def lock(
        self,
        key: str,
        holder: str,
        *,
        lease_s: float = 30.0,
        wait: Callable[[str], None] | None = None,
    ) -> AbstractContextManager[Lock]:
        """Take a lock. While somebody else holds it, wait, and tell `wait` who does; a holder that died loses it.

        Args:
            key: Of the lock, any text.
            holder: What others are told.
            lease_s: How long the lock outlasts a holder that was cut off; one that died on this machine loses it at
                once.
            wait: Called each time that the holder was looked at, about once a second; an exception ends the waiting.
        """

    def use(self, fingerprint: str, holder: str, lease_s: float = 3600.0) -> None:
        """Say that a deployment uses a bundle, or a build a step, until the lease ends or is renewed by another call.

        Raises:
            ConfigError: There is no such bundle or step, or a collection removed it just now.
        """

    def collect(
        self,
        *,
        keep_versions: int = 5,
        keep_steps_s: float = 7 * 86400.0,
        grace_s: float = 3600.0,
        dry_run: bool = False,
    ) -> Collected:
        """Remove what nobody needs.

        Kept are bundles that an alias points to, or pointed to before its last move, or would be rolled back to, that
        are among the newest `keep_versions` of a name, or in use; steps younger than `keep_steps_s`, in use, or all of
        them while a build is running; whatever is younger than `grace_s`; and every blob of these, and of a publication
        under way.

        Raises:
            BundleCorrupt: A bundle's manifest cannot be read, so that nobody knows which blobs it needs.
        """
