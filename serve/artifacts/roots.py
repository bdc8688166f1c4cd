"""Roots: what a running publication needs, so that no collection removes it.

A collection may begin at any moment, and looks at these records once. So whoever needs something of the store
1. writes what he needs below `pending/`,
2. waits until no collection runs that began before, and did not see it (`settle`),
3. looks whether what he needs is still there: from now on it stays,
4. writes what makes the collection keep it for good (a manifest, a version, ...), and removes the record.
A collection in turn lists `pending/` before it reads manifests and names: what is not pending any more is in these.
"""

import logging
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from serve.artifacts.clock import Clock
from serve.artifacts.json_object import number, read_json, write_json
from serve.artifacts.leases import Leases
from serve.artifacts.objects import Objects
from serve.artifacts.process_identity import from_json, this_process
from serve.errors import StoreUnavailable

_log = logging.getLogger(__name__)

PENDING = "pending"
COLLECTION_LOCK = "collection"
# How long a record counts when nobody renews it. Judged by the collector's clock: long, beside what clocks differ by.
PENDING_LEASE_S = 6 * 3600.0
_NOTED_WITHIN_S = 60.0


def settle(leases: Leases) -> None:
    """Wait until no collection runs that began before."""
    told: list[str] = []

    def wait(holder: str) -> None:
        if not told:
            _log.info("waiting for the %s", holder)
            told.append(holder)

    leases.wait_until_free(COLLECTION_LOCK, wait)


class Pending:
    """One record. Made by `Roots`."""

    def __init__(self, objects: Objects, clock: Clock, leases: Leases, fingerprint: str) -> None:
        self._objects = objects
        self._clock = clock
        self._leases = leases
        self._fingerprint = fingerprint
        self._key: str | None = None
        self._written_s = 0.0
        self._lock = threading.Lock()
        self._noted: set[str] = set()

    def note(self, blob: str) -> None:
        """Say that a blob is going to be needed. Written soon, not at once: a collection passes over young blobs."""
        with self._lock:
            self._noted.add(blob)
            if self._clock.now_s() - self._written_s > _NOTED_WITHIN_S:
                self.write(self._noted)

    def write(self, blobs: Collection[str]) -> None:
        """Say what is needed from now on."""
        self._written_s = self._clock.now_s()
        record = {
            "fingerprint": self._fingerprint,
            "blobs": sorted(blobs),
            "process": this_process().to_json(),
            "expires_s": self._written_s + PENDING_LEASE_S,
        }
        # Each time under a new key: a collection that saw the old one when it had expired may just be removing it.
        before, self._key = self._key, f"{PENDING}/{uuid.uuid4().hex}.json"
        self._objects.put(self._key, write_json(record))
        if before is not None:
            self._objects.delete(before)

    def settle(self) -> None:
        """Wait until no collection runs that may not have seen the record."""
        settle(self._leases)

    @property
    def is_fresh(self) -> bool:
        """Whether the record counts for long enough yet to rely on it."""
        return self._clock.now_s() - self._written_s < PENDING_LEASE_S / 2

    def remove(self) -> None:
        """Remove the record."""
        if self._key is None:
            return
        try:
            self._objects.delete(self._key)
        except StoreUnavailable as exc:
            _log.warning("a record of what was published stays until it expires: %s", exc)


class Roots:
    """The pending records of one store."""

    def __init__(self, objects: Objects, clock: Clock, leases: Leases) -> None:
        self._objects = objects
        self._clock = clock
        self._leases = leases

    @contextmanager
    def pending(self, fingerprint: str) -> Iterator[Pending]:
        """Make a record of a bundle or step; the caller writes it. Removed when the block ends."""
        record = Pending(self._objects, self._clock, self._leases, fingerprint)
        try:
            yield record
        finally:
            record.remove()

    def settle(self) -> None:
        """Wait until no collection runs that may not have seen what was written before."""
        settle(self._leases)

    def alive(self) -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
        """Return the fingerprints and the blobs that are needed, and the keys of records that nobody needs any more."""
        fingerprints: set[str] = set()
        blobs: set[str] = set()
        dead = []
        for info in self._objects.listing(PENDING):
            record = read_json(self._objects.read(info.key))
            if record is None:  # removed meanwhile: what it named is in a manifest
                continue
            expires_s = number(record.get("expires_s"), 0.0)
            if expires_s < self._clock.now_s() or from_json(record.get("process")).is_surely_dead():
                dead.append(info.key)
            else:
                fingerprints.add(str(record.get("fingerprint")))
                blobs.update(map(str, record.get("blobs", ())))
        return frozenset(fingerprints), frozenset(blobs), tuple(dead)
