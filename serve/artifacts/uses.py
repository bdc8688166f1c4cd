"""Uses: which bundles and steps somebody works with, so that no collection removes them."""

from serve.artifacts.clock import Clock
from serve.artifacts.fingerprint import fingerprint as hash_of
from serve.artifacts.fingerprint import is_fingerprint
from serve.artifacts.json_object import read_json, write_json
from serve.artifacts.objects import Objects

USES = "uses"
# Clocks of other machines may be ahead by this much.
_SKEW_S = 600.0


class Uses:
    """The uses of one store: a lease each, by bundle or step and holder."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock

    def renew(self, fingerprint: str, holder: str, lease_s: float) -> bool:
        """Write a lease; return whether it was running already."""
        key = f"{USES}/{fingerprint}/{hash_of(holder)[:32]}.json"
        now_s = self._clock.now_s()
        before = read_json(self._objects.read(key)) or {}
        self._objects.put(key, write_json({"holder": holder, "expires_s": now_s + lease_s}))
        return float(before.get("expires_s", 0.0)) > now_s

    def holders(self, fingerprint: str) -> tuple[str, ...]:
        """Return who uses a bundle or step."""
        records = (
            read_json(self._objects.read(info.key)) or {} for info in self._objects.listing(f"{USES}/{fingerprint}")
        )
        return tuple(sorted(str(record["holder"]) for record in records if self._is_running(record)))

    def alive(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Return the fingerprints in use, and the keys of leases that ended."""
        used, over = set(), []
        for info in self._objects.listing(USES):
            fingerprint = info.key.split("/")[1]
            if is_fingerprint(fingerprint) and self._is_running(read_json(self._objects.read(info.key)) or {}):
                used.add(fingerprint)
            else:
                over.append(info.key)
        return frozenset(used), tuple(over)

    def _is_running(self, record: dict[str, object]) -> bool:
        expires_s = record.get("expires_s", 0.0)
        return isinstance(expires_s, int | float) and expires_s + _SKEW_S > self._clock.now_s()
