"""A store beside a model of it: whatever is done in whatever order, both say the same."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.artifacts.reference import BundleReference
from serve.artifacts.store import Store
from serve.errors import ConfigError
from tests.unit.artifacts.fakes import (
    FakeTime,
    MemoryObjects,
    bundle_contents,
    manifest_fields,
    print_of,
    step_fields,
    write_files,
)

LABELS = st.sampled_from(["a", "b", "c", "d", "e"])
NAMES = st.sampled_from(["m", "n"])
ALIASES = st.sampled_from(["prod", "stage"])
LEASE_S = 3600.0
SKEW_S = 600.0  # the store lets a lease count for so much longer


def files_of(label: str) -> dict[str, bytes]:
    """Return the files of a bundle or step: some its own, some shared with others."""
    return {"own": label.encode(), "shared": b"a" if label in "abc" else b"z"}


@dataclass
class Model:
    """What the store ought to hold: bundles and steps with the time they were written, and names."""

    bundles: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    versions: dict[str, list[str]] = field(default_factory=dict)
    moves: dict[tuple[str, str], list[tuple[str, str | None]]] = field(default_factory=dict)
    uses: dict[str, float] = field(default_factory=dict)

    def rollback(self, name: str, alias: str) -> str | None:
        """Say where an alias goes back to."""
        history = self.moves.get((name, alias), [])
        rejected = {reject for _, reject in history}
        good = [
            to
            for to, _ in history
            if to != history[-1][0] and to not in rejected and print_of(to) in self.all_bundles()
        ]
        return good[-1] if good else None

    def all_bundles(self) -> set[str]:
        """Return the fingerprints of all bundles."""
        return {print_of(label) for label in self.bundles}


class StoreBesideModel(RuleBasedStateMachine):
    """Operations of the port, on a store in memory and on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.time = FakeTime()
        self.objects = MemoryObjects(self.time)
        self.store = Store(self.objects, clock=self.time.clock())
        self.model = Model()
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    def directory(self, label: str) -> Path:
        return write_files(Path(self.folder.name, label), files_of(label))

    @rule(label=LABELS)
    def publish(self, label: str) -> None:
        manifest = self.store.publish_bundle(manifest_fields(label), self.directory(label))
        assert manifest.fingerprint == print_of(label)
        self.model.bundles.setdefault(label, self.time.now_s)

    @rule(label=LABELS)
    def publish_step(self, label: str) -> None:
        self.store.publish_step(step_fields(label), self.directory(label))
        self.model.steps.setdefault(label, self.time.now_s)

    @rule(name=NAMES, label=LABELS)
    def add_version(self, name: str, label: str) -> None:
        if label not in self.model.bundles:
            return refused(lambda: self.store.add_version(name, print_of(label)))
        versions = self.model.versions.setdefault(name, [])
        if versions[-1:] != [label]:
            versions.append(label)
        assert self.store.add_version(name, print_of(label)).number == len(versions)
        return None

    @rule(name=NAMES, alias=ALIASES, label=LABELS)
    def move_alias(self, name: str, alias: str, label: str) -> None:
        if label not in self.model.versions.get(name, []) or label not in self.model.bundles:
            return refused(lambda: self.store.move_alias(name, alias, print_of(label)))
        self.store.move_alias(name, alias, print_of(label))
        self.model.moves.setdefault((name, alias), []).append((label, None))
        return None

    @rule(name=NAMES, alias=ALIASES, reject=st.booleans())
    def roll_back(self, name: str, alias: str, reject: bool) -> None:
        moves = self.model.moves.get((name, alias), [])
        target = self.model.rollback(name, alias)
        if target is None:
            return refused(lambda: self.store.roll_back(name, alias, reason="bad"))
        rejected = moves[-1][0] if reject else None
        self.store.roll_back(name, alias, reason="bad", rejected=print_of(rejected) if rejected else None)
        moves.append((target, rejected))
        return None

    @rule(label=LABELS)
    def use(self, label: str) -> None:
        if label not in self.model.bundles and label not in self.model.steps:
            running = self.model.uses.get(label, 0.0) > self.time.now_s
            if not running:
                refused(lambda: self.store.use(print_of(label), "deployment", LEASE_S))
        else:
            self.store.use(print_of(label), "deployment", LEASE_S)
        # Said it is, whether it was there or not.
        self.model.uses[label] = max(self.model.uses.get(label, 0.0), self.time.now_s + LEASE_S)

    @rule(seconds=st.sampled_from([1.0, 2000.0, 5000.0]))
    def wait(self, seconds: float) -> None:
        self.time.sleep(seconds)

    @precondition(lambda self: self.model.bundles or self.model.steps)
    @rule(
        keep=st.integers(0, 3),
        keep_steps_s=st.sampled_from([0.0, 3000.0]),
        grace_s=st.sampled_from([-1.0, 1500.0]),
        building=st.booleans(),
    )
    def collect(self, keep: int, keep_steps_s: float, grace_s: float, building: bool) -> None:
        needed = self.needed(keep, grace_s)
        youngest_s = max(keep_steps_s, grace_s)
        steps = {
            label
            for label, written_s in self.model.steps.items()
            if building or self.is_used(label) or self.time.now_s - written_s <= youngest_s
        }
        with self.store.lock("build", "builder") if building else nullcontext():
            would = self.store.collect(keep_versions=keep, keep_steps_s=keep_steps_s, grace_s=grace_s, dry_run=True)
            done = self.store.collect(keep_versions=keep, keep_steps_s=keep_steps_s, grace_s=grace_s)
        assert done == would
        assert set(done.bundles) == {print_of(label) for label in self.model.bundles if label not in needed}
        assert set(done.steps) == {print_of(label) for label in self.model.steps if label not in steps}
        self.model.bundles = {label: at for label, at in self.model.bundles.items() if label in needed}
        self.model.steps = {label: at for label, at in self.model.steps.items() if label in steps}
        if grace_s < 0:
            labels = self.model.bundles.keys() | self.model.steps.keys()
            assert len(self.objects.listing("blobs")) == len({data for lb in labels for data in files_of(lb).values()})

    def needed(self, keep: int, grace_s: float) -> set[str]:
        """Return the labels of the bundles that a collection has to keep, and no others."""
        model = self.model
        needed = {label for label, written_s in model.bundles.items() if self.time.now_s - written_s <= grace_s}
        needed |= {label for label in model.bundles if self.is_used(label)}
        for versions in model.versions.values():
            needed |= set(versions[len(versions) - min(keep, len(versions)) :])
        for (name, alias), moves in model.moves.items():
            needed |= {to for to, _ in moves[-2:]} | {model.rollback(name, alias) or ""}
            rejected = {reject for _, reject in moves}
            earlier = [to for to, _ in moves[: last_index(moves)] if to not in {*rejected, moves[-1][0]}]
            needed |= set(earlier[-1:])
        return needed

    def is_used(self, label: str) -> bool:
        return self.model.uses.get(label, 0.0) + SKEW_S > self.time.now_s

    @invariant()
    def bundles_are_complete(self) -> None:
        assert set(self.store.bundles()) == self.model.all_bundles()
        for label in self.model.bundles:
            manifest = self.store.find_bundle(print_of(label))
            assert manifest is not None
            assert bundle_contents(self.objects, manifest.files) == files_of(label)

    @invariant()
    def steps_are_complete(self) -> None:
        for label in "abcde":
            assert (self.store.find_step(print_of(label)) is not None) == (label in self.model.steps)

    @invariant()
    def names_are_right(self) -> None:
        assert set(self.store.names()) == {name for name, versions in self.model.versions.items() if versions}
        for name in ("m", "n"):
            expected = [print_of(label) for label in self.model.versions.get(name, [])]
            assert [version.fingerprint for version in self.store.versions(name)] == expected
            for alias in ("prod", "stage"):
                self.alias_is_right(name, alias)

    def alias_is_right(self, name: str, alias: str) -> None:
        moves = self.model.moves.get((name, alias), [])
        assert [move.fingerprint for move in self.store.history(name, alias)] == [print_of(to) for to, _ in moves]
        if moves:
            # What an alias points to is always there.
            resolved = self.store.resolve(BundleReference("s", name, alias))
            assert resolved.fingerprint == print_of(moves[-1][0])


def last_index(moves: list[tuple[str, str | None]]) -> int:
    """Return where an alias came to point to its bundle last."""
    return max(number for number, (to, _) in enumerate(moves) if to == moves[-1][0])


def refused(action: object) -> None:
    """Check that something is refused."""
    assert callable(action)
    try:
        action()
    except ConfigError:
        return
    raise AssertionError("it was not refused")


TestStoreBesideModel = StoreBesideModel.TestCase
TestStoreBesideModel.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
