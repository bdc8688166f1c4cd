"""Leases: build-once locks on storage that has no locks.

A lock is a series of generations, `locks/<key>/<number>`; the highest one owns it:
- `.claim` is written once, by exclusive creation: who takes over creates the next generation, and of several exactly
  one does;
- `.beat` is overwritten by the holder again and again;
- `.released` is written when it is given back.

Generations below the highest are removed by its owner, the highest one never: its number says what the next one is.
Clocks are not compared. A waiter takes over when he saw no beat for the lease, on his own clock, or at once if the
holder was a process of this machine that is gone. A holder that could not write a beat for its lease counts itself
out.

A lock saves work, it protects nothing: between the moment a holder last looked and the moment it writes, it may lose
it. What is published is therefore made exclusive by itself (`publication`).
"""

import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from serve.artifacts.clock import Clock
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.json_object import number, read_json, write_json
from serve.artifacts.objects import Objects
from serve.artifacts.process_identity import ProcessIdentity, from_json, this_process
from serve.errors import StoreUnavailable

_log = logging.getLogger(__name__)

LOCKS = "locks"
_LONGEST_KEY = 150
# Until a listing shows what somebody else wrote just now; network file systems take their time.
_AGAIN_S = 0.05


@dataclass(frozen=True)
class Claim:
    """One generation of a lock, as a listing and two reads show it.

    Attributes:
        number: Of the generation.
        holder: What its owner calls itself.
        process: The owner.
        lease_s: It is lost after so long without a beat.
        released: Given back.
        beat: Last sign of life: changes while the owner lives.
        beat_s: When it was written, by the owner's clock, seconds since the epoch.
    """

    number: int
    holder: str
    process: ProcessIdentity
    lease_s: float
    released: bool
    beat: bytes
    beat_s: float

    @property
    def text(self) -> str:
        """Who it is, for people."""
        return f"{self.holder} (process {self.process.pid} on {self.process.host})"

    @property
    def is_free(self) -> bool:
        """Whether nobody has to be waited for."""
        return self.released or self.process.is_surely_dead()


class Leases:
    """The locks of one store.

    Args:
        objects: Of the store.
        clock: Time.
        process: Who we are; None: the process that takes the lock.
    """

    def __init__(self, objects: Objects, clock: Clock, process: ProcessIdentity | None = None) -> None:
        self._objects = objects
        self._clock = clock
        self._process = process

    @contextmanager
    def lock(
        self, key: str, holder: str, lease_s: float = 30.0, wait: Callable[[str], None] | None = None
    ) -> "Iterator[HeldLock]":
        """Take a lock, and renew it in the background until the block ends."""
        held = self.acquire(key, holder, lease_s, wait)
        held.start_renewing()
        try:
            yield held
        finally:
            held.release()

    def acquire(
        self, key: str, holder: str, lease_s: float = 30.0, wait: Callable[[str], None] | None = None
    ) -> "HeldLock":
        """Take a lock; the caller renews it.

        Args:
            key: Of the lock.
            holder: What waiters are told.
            lease_s: How long the lock outlasts a holder that was cut off.
            wait: Told who holds it, each time that was looked at; an exception ends the waiting.
        """
        while True:
            held = self._claim(key, holder, lease_s, self.wait_until_free(key, wait) + 1)
            if held is not None:
                return held
            self._clock.sleep(_AGAIN_S)

    def wait_until_free(self, key: str, wait: Callable[[str], None] | None = None) -> int:
        """Wait until nobody alive holds a lock, without taking it; return its highest generation, 0: none."""
        watch = _Watch()
        while (current := self.current(key)) is not None and not current.is_free:
            if watch.is_over(current, self._clock.monotonic_s()):
                _log.warning("lock %s: no sign of life of %s for %.0f s", key, current.text, current.lease_s)
                break
            if wait is not None:
                wait(current.text)
            self._clock.sleep(min(1.0, max(0.05, current.lease_s / 20)))
        return current.number if current else 0

    def current(self, key: str) -> Claim | None:
        """Return the highest generation of a lock; None: nobody ever took it."""
        return self._highest(_folder(key))

    def held(self) -> tuple[tuple[str, Claim], ...]:
        """Return the locks that were not given back, each with the name of its folder."""
        by_name: dict[str, set[str]] = {}
        for info in self._objects.listing(LOCKS):
            _, *names, file = info.key.split("/")
            if len(names) == 1 and _number_of(file) is not None:
                by_name.setdefault(names[0], set()).add(file)
        # Those that were given back, most of them, are known by the listing alone.
        names = [name for name, files in by_name.items() if f"{_highest_stem(files)}.released" not in files]
        claims = ((name, self._highest(f"{LOCKS}/{name}")) for name in sorted(names))
        return tuple((name, claim) for name, claim in claims if claim is not None and not claim.released)

    def _highest(self, folder: str) -> Claim | None:
        while True:
            names = {info.key.removeprefix(f"{folder}/") for info in self._objects.listing(folder)}
            stem = _highest_stem(names)
            if stem is None:
                return None
            claim = self._objects.read(f"{folder}/{stem}.claim")
            if claim is not None:
                beat = self._objects.read(f"{folder}/{stem}.beat") or b""
                return _claim_of(int(stem), read_json(claim) or {}, beat, released=f"{stem}.released" in names)
            # It was the highest when it was listed; the owner of a higher one has removed it since.

    def _claim(self, key: str, holder: str, lease_s: float, number: int) -> "HeldLock | None":
        started_s = self._clock.monotonic_s()
        content = write_json(
            {
                "holder": holder,
                "process": (self._process or this_process()).to_json(),
                "lease_s": lease_s,
                "now_s": self._clock.now_s(),
                "nonce": uuid.uuid4().hex,
            }
        )
        if not self._objects.create(f"{_folder(key)}/{number:08d}.claim", content):
            return None
        held = HeldLock(self._objects, self._clock, _folder(key), number, lease_s, started_s)
        # Whoever looked long ago may have created a generation that was removed since: only the highest one owns.
        if held.is_outdone():
            held.release()
            return None
        held.remove_older()
        return held


class _Watch:
    """What a waiter saw of a holder, and since when, by the waiter's clock."""

    def __init__(self) -> None:
        self._seen: tuple[int, bytes] | None = None
        self._seen_s = 0.0

    def is_over(self, claim: Claim, now_s: float) -> bool:
        """Return whether the holder showed no sign of life for its lease."""
        if self._seen != (claim.number, claim.beat):
            self._seen, self._seen_s = (claim.number, claim.beat), now_s
        return now_s - self._seen_s > claim.lease_s


class HeldLock:
    """A lock that this process took. Made by `Leases`.

    Args:
        objects: Of the store.
        clock: Time.
        folder: Of the lock.
        number: Of our generation.
        lease_s: We are out after so long without a beat.
        renewed_s: When the last beat began, by the monotonic clock.
    """

    def __init__(
        self, objects: Objects, clock: Clock, folder: str, number: int, lease_s: float, renewed_s: float
    ) -> None:
        self._objects = objects
        self._clock = clock
        self._folder = folder
        self._number = number
        self._lease_s = lease_s
        self._renewed_s = renewed_s
        self._outdone = False
        self._released = threading.Event()
        self._renewing: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether it is somebody else's by now, or may be."""
        return self._outdone or self._clock.monotonic_s() - self._renewed_s > self._lease_s

    def is_outdone(self) -> bool:
        """Return whether there is a higher generation than ours."""
        for info in self._objects.listing(self._folder):
            number = _number_of(info.key)
            if info.key.endswith(".claim") and number is not None and number > self._number:
                self._outdone = True
        return self._outdone

    def renew(self) -> None:
        """Write a sign of life, unless the lock was lost already."""
        if self.lost or self.is_outdone():
            return
        began_s = self._clock.monotonic_s()
        beat = write_json({"now_s": self._clock.now_s(), "nonce": uuid.uuid4().hex})
        self._objects.put(f"{self._folder}/{self._number:08d}.beat", beat)
        if not self.lost:
            self._renewed_s = began_s

    def start_renewing(self) -> None:
        """Renew in a thread, three times a lease, until the lock is released or lost."""
        self._renewing = threading.Thread(target=self._renew_again_and_again, name="lease", daemon=True)
        self._renewing.start()

    def _renew_again_and_again(self) -> None:
        while not self._released.wait(self._lease_s / 3) and not self.lost:
            try:
                self.renew()
            except StoreUnavailable as exc:
                _log.warning("lock %s could not be renewed: %s", self._folder, exc)
        if self.lost and not self._released.is_set():
            _log.warning("lock %s was lost: somebody else took it, or may have", self._folder)

    def release(self) -> None:
        """Give it back; safe to call twice."""
        if self._released.is_set():
            return
        self._released.set()
        if self._renewing is not None:
            self._renewing.join()
        try:
            self._objects.put(f"{self._folder}/{self._number:08d}.released", b"{}\n")
        except StoreUnavailable as exc:
            _log.warning("lock %s could not be given back, and runs out by itself: %s", self._folder, exc)

    def remove_older(self) -> None:
        """Remove the generations before ours."""
        for info in self._objects.listing(self._folder):
            number = _number_of(info.key)
            if number is not None and number < self._number:
                self._objects.delete(info.key)


def _number_of(key: str) -> int | None:
    """Return the generation that a file belongs to; None: it is none of ours, but, say, NFS's or a file manager's."""
    stem = key.rpartition("/")[2].partition(".")[0]
    return int(stem) if stem.isdigit() else None


def _highest_stem(names: Collection[str]) -> str | None:
    """Return the number of the highest generation, as files have it; None: there is none."""
    stems = (name.removesuffix(".claim") for name in names if name.endswith(".claim"))
    return max(filter(str.isdigit, stems), default=None)


def _claim_of(generation: int, claim: dict[str, Any], beat: bytes, *, released: bool) -> Claim:
    return Claim(
        number=generation,
        holder=str(claim.get("holder", "somebody")),
        process=from_json(claim.get("process")),
        lease_s=number(claim.get("lease_s"), 30.0),
        released=released,
        beat=beat,
        beat_s=number((read_json(beat) or claim).get("now_s"), 0.0),
    )


def _folder(key: str) -> str:
    name = quote(key, safe="")
    plain = name.strip(".") and len(name) <= _LONGEST_KEY
    return f"{LOCKS}/{name if plain else fingerprint(key)}"
