"""Locks on storage without locks, in time that the tests let pass."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.leases import Leases
from serve.artifacts.process_identity import ProcessIdentity, from_json, this_process
from tests.unit.artifacts.fakes import FakeTime, MemoryObjects

LEASE_S = 30.0


class Busy(Exception):
    """Somebody else has the lock."""


def refuse(_holder: str) -> None:
    raise Busy


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def objects(time: FakeTime) -> MemoryObjects:
    return MemoryObjects(time)


@pytest.fixture
def leases(objects: MemoryObjects, time: FakeTime) -> Leases:
    return Leases(objects, time.clock())


def elsewhere(objects: MemoryObjects, time: FakeTime, ahead_s: float = 0.0) -> Leases:
    """Return the locks as a process on another machine sees them, whose clock is ahead by so much."""
    return Leases(objects, time.clock(ahead_s), ProcessIdentity("elsewhere", "another boot", 1, 1))


def test_a_renewed_lock_is_not_taken_however_long_it_lasts(
    leases: Leases, objects: MemoryObjects, time: FakeTime
) -> None:
    held = elsewhere(objects, time).acquire("build", "first", LEASE_S)
    looks = 0

    def wait(holder: str) -> None:
        nonlocal looks
        assert holder == "first (process 1 on elsewhere)"
        looks += 1
        if looks % 20 == 0:
            held.renew()
        if looks == 200:
            raise Busy

    with pytest.raises(Busy):
        leases.acquire("build", "second", LEASE_S, wait)
    assert time.now_s > 1_000_000.0 + 5 * LEASE_S
    assert not held.lost


def test_a_lock_that_nobody_renews_is_taken_over_after_its_lease(
    leases: Leases, objects: MemoryObjects, time: FakeTime
) -> None:
    held = elsewhere(objects, time).acquire("build", "first", LEASE_S)
    began_s = time.now_s
    second = leases.acquire("build", "second", LEASE_S)
    assert LEASE_S < time.now_s - began_s < LEASE_S + 3.0
    assert held.lost
    held.renew()  # it wakes up, and writes nothing
    assert not second.lost
    held.release()  # of its own generation only
    with pytest.raises(Busy):
        leases.acquire("build", "third", LEASE_S, refuse)


@given(ahead_s=st.floats(-1e6, 1e6))
def test_clocks_of_different_machines_are_not_compared(ahead_s: float) -> None:
    time = FakeTime()
    objects = MemoryObjects(time)
    elsewhere(objects, time, ahead_s).acquire("build", "first", LEASE_S)
    began_s = time.now_s
    Leases(objects, time.clock()).acquire("build", "second", LEASE_S)
    assert LEASE_S < time.now_s - began_s < LEASE_S + 3.0


def test_a_holder_that_died_on_this_machine_is_not_waited_for(
    leases: Leases, objects: MemoryObjects, time: FakeTime
) -> None:
    dead = replace(this_process(), started=this_process().started + 1)  # its number is somebody else's now
    Leases(objects, time.clock(), dead).acquire("build", "first", LEASE_S)
    leases.acquire("build", "second", LEASE_S, refuse)


def test_a_released_lock_is_free_at_once_and_counts_on(leases: Leases, objects: MemoryObjects) -> None:
    for _ in range(3):
        held = leases.acquire("build", "somebody", LEASE_S, refuse)
        held.release()
        held.release()
    # The last one stays, because its number says what the next one is; those before it went.
    assert [info.key for info in objects.listing("locks")] == [
        "locks/build/00000003.claim",
        "locks/build/00000003.released",
    ]


def test_a_holder_that_cannot_reach_the_store_counts_itself_out(leases: Leases, time: FakeTime) -> None:
    held = leases.acquire("build", "first", LEASE_S)
    time.sleep(LEASE_S - 1)
    assert not held.lost
    held.renew()
    time.sleep(LEASE_S - 1)
    assert not held.lost
    time.sleep(2)
    assert held.lost


@given(key=st.text(max_size=300))
def test_any_text_is_a_key_of_its_own(key: str) -> None:
    time = FakeTime()
    objects = MemoryObjects(time)
    leases = Leases(objects, time.clock())
    leases.acquire(key, "first", LEASE_S)
    leases.acquire(key + "x", "second", LEASE_S, refuse)
    with pytest.raises(Busy):
        leases.acquire(key, "third", LEASE_S, refuse)
    for info in objects.listing("locks"):
        parts = info.key.split("/")
        assert len(parts) == 3
        assert not {"", ".", ".."} & set(parts)
        assert len(parts[1]) <= 150


def test_files_of_others_and_damaged_ones_are_passed_over(leases: Leases, objects: MemoryObjects) -> None:
    leases.acquire("build", "first", LEASE_S).release()
    for name in ("build/.nfs0000000012", "build/.nfs0000000012.claim", ".DS_Store", "build/deep/00000009.claim"):
        objects.put(f"locks/{name}", b"")
    objects.put("locks/build/00000001.beat", b'{"now_s": null}')
    held = leases.acquire("build", "second", LEASE_S, refuse)
    assert not held.is_outdone()
    assert [name for name, _ in leases.held()] == ["build"]
    objects.put("locks/build/00000002.claim", b'{"lease_s": null}')
    claim = leases.current("build")
    assert claim is not None
    assert claim.lease_s == LEASE_S


def test_a_process_is_dead_when_its_number_is_unused_or_anothers() -> None:
    here = this_process()
    assert not here.is_surely_dead()
    assert replace(here, started=here.started - 1).is_surely_dead()
    assert replace(here, pid=2**22 + 1).is_surely_dead()
    assert not replace(here, system="another boot", pid=2**22 + 1).is_surely_dead()
    assert from_json(here.to_json()) == here
    assert not from_json({"pid": "x"}).is_surely_dead()
