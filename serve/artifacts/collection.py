"""Collection: mark what is needed, remove the rest.

One at a time, under a lock that publications wait for (`roots`). Records go before the blobs they need, so that a
collection that was broken off leaves blobs that nobody needs, and never a record without its blobs. Before each
removal it looks whether it still has the lock: a collector that was stopped for longer than its lease, while it
removed something, and then goes on, is the one case that locks on such storage cannot rule out; at worst one blob is
missing then, which is told, and mended by publishing again.
"""

import logging
from collections.abc import Iterable

from serve.artifacts.blobs import BLOBS
from serve.artifacts.clock import Clock
from serve.artifacts.fingerprint import is_fingerprint
from serve.artifacts.json_object import read_json
from serve.artifacts.leases import HeldLock, Leases
from serve.artifacts.marking import KeepRules, StoredRecord, StoreState, kept_bundles, kept_steps
from serve.artifacts.names import Names
from serve.artifacts.objects import ObjectInfo, Objects, read_many
from serve.artifacts.port import Collected
from serve.artifacts.publication import BUNDLES, STEPS
from serve.artifacts.roots import COLLECTION_LOCK, Roots
from serve.artifacts.sealing import unseal
from serve.artifacts.uses import Uses
from serve.errors import BundleCorrupt, StoreUnavailable

_log = logging.getLogger(__name__)

BUILDS = "builds"
TEMPORARY = "tmp"
# A file that was written to within this time belongs to somebody who is still writing.
_TEMPORARY_S = 86400.0
# A lock without a sign of life for so long belongs to nobody, whatever clocks say.
_SILENCE_S = 900.0
_LEASE_S = 60.0


class Collector:
    """Collects one store."""

    def __init__(self, objects: Objects, clock: Clock, leases: Leases, roots: Roots, names: Names, uses: Uses) -> None:
        self._objects = objects
        self._clock = clock
        self._leases = leases
        self._roots = roots
        self._names = names
        self._uses = uses

    def collect(self, rules: KeepRules, *, dry_run: bool) -> Collected:
        """Remove what nobody needs, or say what that is."""
        if dry_run:
            return self._sweep(rules, None)
        with self._leases.lock(COLLECTION_LOCK, "garbage collection", _LEASE_S) as held:
            self._wait_for_listings(held)
            return self._sweep(rules, held)

    def _wait_for_listings(self, held: HeldLock) -> None:
        """Wait until whoever did not see the lock can be seen.

        A publisher that looked for the lock too early to see it wrote what it needs before; and what it wrote is seen
        here as much later again.
        """
        left_s = 2 * self._objects.staleness_s
        while left_s > 0:
            self._clock.sleep(min(left_s, _LEASE_S / 4))
            held.renew()
            left_s -= _LEASE_S / 4

    def _sweep(self, rules: KeepRules, held: HeldLock | None) -> Collected:
        now_s = self._clock.now_s()
        # In this order: what is published meanwhile is pending when that is listed, or in a manifest, read after it.
        blobs = self._objects.listing(BLOBS)
        pending, pending_blobs, dead = self._roots.alive()
        used, over = self._uses.alive()
        state = self._read(pending | used, now_s)
        bundles, steps = kept_bundles(state, rules, now_s), kept_steps(state, rules, now_s)
        needed = set(pending_blobs)
        for kept, records in ((bundles, state.bundles), (steps, state.steps)):
            needed.update(*(records[key].blobs for key in kept))
        lost_bundles = tuple(sorted(set(state.bundles) - bundles))
        lost_steps = tuple(sorted(set(state.steps) - steps))
        unneeded = [
            info
            for info in blobs
            if info.key.rpartition("/")[2] not in needed and not self._is_young(info, now_s, rules.grace_s)
        ]
        if held is not None:
            self._remove(held, (f"{BUNDLES}/{key}.json" for key in lost_bundles))
            self._remove(held, (f"{STEPS}/{key}.json" for key in lost_steps))
            self._remove(held, (info.key for info in unneeded))
            self._remove(held, (*dead, *over, *self._dangling(bundles, now_s, rules.grace_s)))
        return Collected(lost_bundles, lost_steps, len(unneeded), sum(info.size_bytes for info in unneeded))

    def _read(self, used: frozenset[str], now_s: float) -> StoreState:
        names = self._names.names()
        return StoreState(
            bundles=self._records(BUNDLES, now_s),
            steps=self._records(STEPS, now_s),
            versions={name: self._names.versions(name) for name in names},
            histories=[self._names.history(name, alias) for name in names for alias in self._names.aliases(name)],
            used=used,
            is_building=self._is_building(now_s),
        )

    def _records(self, folder: str, now_s: float) -> dict[str, StoredRecord]:
        records = {}
        infos = self._objects.listing(folder)
        contents = read_many(self._objects, [info.key for info in infos])
        for info in infos:
            key = info.key.rpartition("/")[2].removesuffix(".json")
            data = contents[info.key]
            if data is None or not is_fingerprint(key):
                continue
            blobs = _blobs(data)
            if blobs is None and folder == BUNDLES:
                raise BundleCorrupt(
                    f"{self._objects.url}/{info.key} is no manifest, or was changed, so that nobody knows which files "
                    "it needs; nothing was removed. Look at it, and remove it if it is of no use"
                )
            written_s = info.modified_s if info.modified_s is not None else now_s
            records[key] = StoredRecord(written_s if blobs is not None else 0.0, blobs or frozenset())
        return records

    def _is_building(self, now_s: float) -> bool:
        return any(
            name != COLLECTION_LOCK and not claim.is_free and now_s - claim.beat_s < _SILENCE_S
            for name, claim in self._leases.held()
        )

    def _dangling(self, bundles: frozenset[str], now_s: float, grace_s: float) -> Iterable[str]:
        for info in self._objects.listing(BUILDS):
            record = read_json(self._objects.read(info.key)) or {}
            if record.get("fingerprint") not in bundles and not self._is_young(info, now_s, grace_s):
                yield info.key
        for info in self._objects.listing(TEMPORARY):
            if not self._is_young(info, now_s, _TEMPORARY_S):
                yield info.key

    def _is_young(self, info: ObjectInfo, now_s: float, age_s: float) -> bool:
        return info.modified_s is None or now_s - info.modified_s <= age_s

    def _remove(self, held: HeldLock, keys: Iterable[str]) -> None:
        for key in keys:
            if held.lost:
                raise StoreUnavailable(
                    f"{self._objects.url}: the collection lost its lock and stopped; what it removed is complete, run "
                    "it again for the rest"
                )
            self._objects.delete(key)


def _blobs(data: bytes) -> frozenset[str] | None:
    """Return the digests that a record names, whatever fields it has besides; None: it is none, or was changed."""
    try:
        files = unseal(data).get("files")
    except ValueError:
        return None
    if not isinstance(files, list):
        return None
    return frozenset(str(file.get("blake3")) for file in files if isinstance(file, dict))
