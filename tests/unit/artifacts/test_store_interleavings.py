"""Two processes on one store: whatever one does at any moment of the other, the store is right afterwards."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from serve.artifacts.clock import Clock
from serve.artifacts.leases import HeldLock, Leases
from serve.artifacts.objects import ObjectInfo, Objects
from serve.artifacts.process_identity import this_process
from serve.artifacts.store import Store
from serve.errors import ConfigError
from tests.unit.artifacts.fakes import (
    DoingAt,
    FakeTime,
    MemoryObjects,
    Step,
    WatchedObjects,
    bundle_contents,
    manifest_fields,
    print_of,
    step_fields,
    write_files,
)

FILES = {"model/weights": b"weights", "runtime.json": b"{}"}
OTHERS = {"model/weights": b"other weights", "runtime.json": b"{}"}


class WorkedStore(Store):
    """A store, and time that its user takes for something else."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        super().__init__(objects, clock=clock)
        self._sleep = clock.sleep

    def work(self) -> None:
        """Do something else, while other processes go on."""
        self._sleep(1.0)


Action = Callable[[WorkedStore], None]


class Meeting:
    """One process does something, and another one does something else at one step of it.

    The other one runs until it has to wait; then the first one goes on, and the other one when that is done.
    """

    def __init__(self, first: Action, other: Action, prepare: Action) -> None:
        self.time = FakeTime()
        self.objects = MemoryObjects(self.time)
        self.store = self._store(self.objects, self.time.clock())
        prepare(self.store)
        self._first = first
        self._other = other
        self._errors: list[BaseException] = []
        self._first_is_done = threading.Event()
        self._other_waits = threading.Event()

    def at(self, step: int) -> bool:
        """Let them meet at a step; return whether there was such a step."""
        thread = threading.Thread(target=self._run_other)

        def meet() -> None:
            thread.start()
            self._other_waits.wait()

        watch = DoingAt(step, meet)
        try:
            self._first(self._store(WatchedObjects(self.objects, watch), self.time.clock()))
        finally:
            self._first_is_done.set()
            if watch.happened:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return watch.happened

    def _run_other(self) -> None:
        try:
            self._other(self._store(self.objects, replace(self.time.clock(), sleep=self._wait_for_first)))
        except BaseException as exc:  # it has to reach the test
            self._errors.append(exc)
        finally:
            self._other_waits.set()

    def _wait_for_first(self, _seconds: float) -> None:
        self._other_waits.set()
        self._first_is_done.wait()

    def _store(self, objects: Objects, clock: Clock) -> WorkedStore:
        return WorkedStore(objects, clock)


def meet_everywhere(first: Action, other: Action, prepare: Action, after: Callable[[Store], None]) -> int:
    """Let two processes meet at every step of the first one; return how many steps there are."""
    for step in count():
        meeting = Meeting(first, other, prepare)
        met = meeting.at(step)
        after(meeting.store)
        if not met:
            return step
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"), FILES)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("others"), OTHERS)


def publishing(label: str, directory: Path) -> Callable[[Store], None]:
    def publish(store: Store) -> None:
        fingerprint = store.publish_bundle(manifest_fields(label), directory).fingerprint
        store.add_version("m", fingerprint)

    return publish


def collecting(store: Store) -> None:
    store.collect(keep_versions=1, keep_steps_s=0.0, grace_s=-1.0)


def brought_back(store: Store, label: str) -> dict[str, bytes]:
    manifest = store.find_bundle(print_of(label))
    assert manifest is not None
    return bundle_contents(store.objects, manifest.files)


def test_two_publishers_of_one_fingerprint_never_mix(files: Path, others: Path) -> None:
    returned = []

    def first(store: Store) -> None:
        returned.append(store.publish_bundle(manifest_fields("one"), files))

    def other(store: Store) -> None:
        returned.append(store.publish_bundle(manifest_fields("one"), others))

    def after(store: Store) -> None:
        found = store.find_bundle(print_of("one"))
        assert all(manifest == found for manifest in returned)
        returned.clear()
        assert brought_back(store, "one") in (FILES, OTHERS)

    assert meet_everywhere(first, other, lambda _: None, after) > 15


def nearly_garbage(files: Path) -> Callable[[Store], None]:
    """Leave contents in the store that nobody needs, and that the next publication needs again."""

    def prepare(store: Store) -> None:
        store.publish_bundle(manifest_fields("forgotten"), files)

    return prepare


def test_a_collection_during_a_publication_removes_all_of_it_or_nothing(files: Path) -> None:
    kept = []

    def publish(store: Store) -> None:
        store.publish_bundle(manifest_fields("one"), files)

    def after(store: Store) -> None:
        # Without a name, and without the time that young bundles have, it may be removed once it is complete.
        if store.find_bundle(print_of("one")) is not None:
            assert brought_back(store, "one") == FILES
            kept.append(1)

    assert meet_everywhere(publish, collecting, nearly_garbage(files), after) > 15
    assert len(kept) > 15


def test_a_collection_waits_until_listings_show_what_is_needed(files: Path) -> None:
    """A machine whose listings are a minute old sees what a publisher wrote before it could see the lock."""

    class Late(MemoryObjects):
        """Shows to one machine what is pending only after a while."""

        @property
        def staleness_s(self) -> float:
            return 60.0

        def listing(self, prefix: str) -> tuple[ObjectInfo, ...]:
            found = super().listing(prefix)
            late = prefix == "pending"
            return tuple(info for info in found if not late or (info.modified_s or 0.0) <= self.time.now_s - 60.0)

    time = FakeTime()
    objects = Late(time)
    store = Store(objects, clock=time.clock())
    nearly_garbage(files)(store)

    def collect(step: Step) -> None:
        if step.operation == "create" and step.key.startswith("bundles/") and not step.done:
            collecting(store)

    publishing("one", files)(Store(WatchedObjects(objects, collect), clock=time.clock()))
    assert brought_back(store, "one") == FILES


def test_a_publication_during_a_collection_is_whole(files: Path) -> None:
    def after(store: Store) -> None:
        if store.find_bundle(print_of("one")) is None:  # there was no step to meet at
            publishing("one", files)(store)
        assert brought_back(store, "one") == FILES

    assert meet_everywhere(collecting, publishing("one", files), nearly_garbage(files), after) > 15


@pytest.mark.parametrize("collection_is_first", [True, False])
def test_an_alias_never_points_to_what_a_collection_removes(
    files: Path, others: Path, collection_is_first: bool
) -> None:
    moved = []

    def prepare(store: Store) -> None:
        publishing("old", others)(store)
        publishing("new", files)(store)

    def move(store: Store) -> None:
        with suppress(ConfigError):  # it was removed before
            store.move_alias("m", "prod", print_of("old"))
            moved.append(1)

    def after(store: Store) -> None:
        if store.aliases("m"):
            assert brought_back(store, "old") == OTHERS
        assert brought_back(store, "new") == FILES

    pair = (collecting, move) if collection_is_first else (move, collecting)
    assert meet_everywhere(*pair, prepare, after) > 8
    assert moved


@pytest.mark.parametrize("collection_is_first", [True, False])
def test_a_step_that_a_build_found_stays_until_it_is_done(files: Path, collection_is_first: bool) -> None:
    def prepare(store: WorkedStore) -> None:
        store.publish_step(step_fields("one"), files)
        store.work()

    def build(store: WorkedStore) -> None:
        with store.lock("build", "builder"):
            record = store.find_step(print_of("one")) or store.publish_step(step_fields("one"), files)
            store.work()
            assert bundle_contents(store.objects, record.files) == FILES
            store.objects.read("the end")  # a step at which it still has the lock

    def after(_store: Store) -> None:
        pass

    first, other = (collecting, build) if collection_is_first else (build, collecting)
    assert meet_everywhere(first, other, prepare, after) > 12


def test_of_two_movers_both_moves_are_kept(files: Path) -> None:
    def prepare(store: Store) -> None:
        for label in ("zero", "one", "two"):
            publishing(label, files)(store)
        store.move_alias("m", "prod", print_of("zero"))

    def after(store: Store) -> None:
        moves = [move.fingerprint for move in store.history("m", "prod")]
        if len(moves) == 3:
            assert moves[0] == print_of("zero")
            assert set(moves[1:]) == {print_of("one"), print_of("two")}
        else:
            assert moves == [print_of("zero"), print_of("one")]  # there was no step to meet at

    def moving(label: str) -> Action:
        def move(store: Store) -> None:
            store.move_alias("m", "prod", print_of(label))

        return move

    assert meet_everywhere(moving("one"), moving("two"), prepare, after) > 5


def test_of_two_that_roll_back_the_same_failure_one_does(files: Path) -> None:
    def prepare(store: Store) -> None:
        for label in ("zero", "one", "two"):
            publishing(label, files)(store)
            store.move_alias("m", "prod", print_of(label))

    def roll_back(store: Store) -> None:
        assert store.roll_back("m", "prod", reason="bad", rejected=print_of("two")).fingerprint == print_of("one")

    def after(store: Store) -> None:
        assert [move.rejected for move in store.history("m", "prod")] == [None, None, None, print_of("two")]

    assert meet_everywhere(roll_back, roll_back, prepare, after) > 5


class Busy(Exception):
    """Somebody else has the lock."""


def refuse(_holder: str) -> None:
    raise Busy


def leave_nothing(_leases: Leases, _dead: Leases) -> None:
    pass


def leave_released(leases: Leases, _dead: Leases) -> None:
    leases.acquire("build", "before").release()


def leave_dead(_leases: Leases, dead: Leases) -> None:
    dead.acquire("build", "before")


@pytest.mark.parametrize("leave", [leave_nothing, leave_released, leave_dead])
def test_of_two_lockers_exactly_one_holds(leave: Callable[[Leases, Leases], None]) -> None:
    for step in count():
        objects, clock = MemoryObjects(), FakeTime().clock()
        leases = Leases(objects, clock)
        leave(leases, Leases(objects, clock, replace(this_process(), started=1)))
        held: list[HeldLock] = []

        def take(through: Leases = leases, held: list[HeldLock] = held) -> None:
            with suppress(Busy):
                held.append(through.acquire("build", "somebody", wait=refuse))

        watched = WatchedObjects(objects, watch := DoingAt(step, take))
        take(Leases(watched, clock))
        met, watched.watch = watch.happened, lambda _step: None
        assert len([lock for lock in held if not (lock.lost or lock.is_outdone())]) == 1
        if not met:
            break
    assert step > 5
