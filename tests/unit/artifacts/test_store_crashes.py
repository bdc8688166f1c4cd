"""A process that dies at any operation on the storage leaves the store right, and the next one goes on."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from serve.artifacts.objects import Objects
from serve.artifacts.store import Store
from tests.unit.artifacts.fakes import (
    DyingAt,
    FakeTime,
    Killed,
    MemoryObjects,
    WatchedObjects,
    bundle_contents,
    manifest_fields,
    print_of,
    step_fields,
    write_files,
)

FILES = {"model/weights": b"weights", "runtime.json": b"{}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"), FILES)


class Scene:
    """A store in memory, as the process that dies and those after it see it."""

    def __init__(self) -> None:
        self.time = FakeTime()
        self.objects = MemoryObjects(self.time)
        self.store = self.seen_through(self.objects)

    def copy(self) -> "Scene":
        copied = Scene()
        copied.time.now_s = self.time.now_s
        copied.objects.contents.update(self.objects.contents)
        return copied

    def seen_through(self, objects: Objects) -> Store:
        return Store(objects, clock=self.time.clock())

    def dies(self, action: Callable[[Store], object], step: int) -> bool:
        """Do something in a process that dies at a step; return whether it got that far."""
        watch = DyingAt(step)
        try:
            action(self.seen_through(WatchedObjects(self.objects, watch)))
        except Killed:
            assert watch.happened
        return watch.happened


def every_death(before: Scene, action: Callable[[Store], object], after: Callable[[Scene], None]) -> int:
    """Let a process die at every step of an action, each time in the same scene; return how many steps there are."""
    for step in count():
        scene = before.copy()
        died = scene.dies(action, step)
        after(scene)
        if not died:
            return step
    raise AssertionError("unreachable")


def test_a_publisher_that_dies_leaves_nothing_half(files: Path) -> None:
    def publish(store: Store) -> None:
        fingerprint = store.publish_bundle(manifest_fields("one"), files).fingerprint
        store.add_version("m", fingerprint)
        store.move_alias("m", "prod", fingerprint)

    def after(scene: Scene) -> None:
        manifest = scene.store.find_bundle(print_of("one"))
        assert manifest is None or bundle_contents(scene.objects, manifest.files) == FILES
        assert {version.fingerprint for version in scene.store.versions("m")} <= {print_of("one")}
        publish(scene.store)
        assert [version.number for version in scene.store.versions("m")] == [1]
        assert scene.store.aliases("m")["prod"].fingerprint == print_of("one")
        scene.time.sleep(7 * 3600.0)  # until what the dead one needed expires
        scene.store.collect(grace_s=0.0)
        assert scene.objects.listing("pending") == ()
        manifest = scene.store.find_bundle(print_of("one"))
        assert manifest is not None
        assert bundle_contents(scene.objects, manifest.files) == FILES

    assert every_death(Scene(), publish, after) > 40


def test_a_step_that_dies_while_it_is_published_is_done_again(files: Path) -> None:
    def publish(store: Store) -> None:
        store.publish_step(step_fields("one"), files)

    def after(scene: Scene) -> None:
        record = scene.store.find_step(print_of("one"))
        if record is None:
            record = scene.store.publish_step(step_fields("one"), files)
        assert bundle_contents(scene.objects, record.files) == FILES

    assert every_death(Scene(), publish, after) > 15


def test_a_collection_that_dies_leaves_what_is_needed(files: Path, tmp_path: Path) -> None:
    directories = [write_files(tmp_path / f"bundle-{n}", {"own": bytes([n]), "shared": b"shared"}) for n in range(4)]

    before = Scene()
    for number, directory in enumerate(directories):
        fingerprint = before.store.publish_bundle(manifest_fields(f"number {number}"), directory).fingerprint
        before.store.add_version("m", fingerprint)
    before.store.move_alias("m", "prod", print_of("number 0"))
    before.store.publish_step(step_fields("step"), files)
    before.time.sleep(1000.0)

    def collect(store: Store) -> None:
        store.collect(keep_versions=1, keep_steps_s=0.0, grace_s=0.0)

    def after(scene: Scene) -> None:
        for finished in (False, True):
            left = scene.store.bundles()
            assert {print_of("number 0"), print_of("number 3")} <= set(left)
            for fingerprint in left:
                manifest = scene.store.find_bundle(fingerprint)
                assert manifest is not None
                assert set(bundle_contents(scene.objects, manifest.files)) == {"own", "shared"}
            if not finished:
                scene.time.sleep(1000.0)  # until the dead one's lock is nobody's
                collect(scene.store)
        assert len(left) == 2
        assert scene.store.find_step(print_of("step")) is None
        assert len(scene.objects.listing("blobs")) == 3

    assert every_death(before, collect, after) > 30


def test_a_lock_whose_holder_died_is_taken_over() -> None:
    def work(store: Store) -> None:
        with store.lock("build", "first", lease_s=30.0):
            pass

    def after(scene: Scene) -> None:
        waited: list[str] = []
        began_s = scene.time.now_s
        with scene.store.lock("build", "second", wait=waited.append) as lock:
            assert not lock.lost
        assert scene.time.now_s - began_s <= 33.0

    assert every_death(Scene(), work, after) > 8


def test_an_alias_whose_mover_died_points_to_one_of_both(files: Path) -> None:
    before = Scene()
    for label in ("one", "two"):
        fingerprint = before.store.publish_bundle(manifest_fields(label), files).fingerprint
        before.store.add_version("m", fingerprint)
    before.store.move_alias("m", "prod", print_of("one"))

    def move(store: Store) -> None:
        store.move_alias("m", "prod", print_of("two"))
        store.roll_back("m", "prod", reason="bad", rejected=print_of("two"))

    def after(scene: Scene) -> None:
        moves = [move.fingerprint for move in scene.store.history("m", "prod")]
        assert moves == [print_of("one"), print_of("two"), print_of("one")][: len(moves)]
        assert scene.store.move_alias("m", "prod", print_of("two")).fingerprint == print_of("two")
        assert len(scene.store.history("m", "prod")) == len(moves) + 1

    assert every_death(before, move, after) > 15
