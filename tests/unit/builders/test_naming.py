"""What names and aliases point to after a build."""

from pathlib import Path

import pytest

from builders.naming import Naming, name_bundle
from builders.spec import parse_spec
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.manifest import Manifest
from serve.artifacts.store import Store, open_store

SPEC = parse_spec({"name": "m", "aliases": ["prod", "canary"]})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def publish(store: Store, content: str, tmp_path: Path) -> Manifest:
    """Put a bundle of one file into the store."""
    directory = tmp_path / content / "model"
    directory.mkdir(parents=True)
    (directory / "weights").write_text(content)
    fields = {
        "fingerprint": fingerprint(content),
        "name": "m",
        "kind": "transformers-checkpoint",
        "model": {"source": "s", "digest": "d", "architecture": "A"},
        "provenance": {"created": "2026-01-01T00:00:00+00:00", "raytrt": "0"},
    }
    return store.publish_bundle(fields, directory.parent)


def test_a_first_build_makes_a_version_and_its_aliases(store: Store, tmp_path: Path) -> None:
    bundle = publish(store, "one", tmp_path)
    assert name_bundle(store, SPEC, bundle) == Naming(1, ("prod", "canary"), ())
    assert {alias: move.fingerprint for alias, move in store.aliases("m").items()} == {
        "prod": bundle.fingerprint, "canary": bundle.fingerprint,
    }  # fmt: skip


def test_a_repeated_build_changes_nothing(store: Store, tmp_path: Path) -> None:
    bundle = publish(store, "one", tmp_path)
    assert name_bundle(store, SPEC, bundle) == name_bundle(store, SPEC, bundle)
    assert len(store.versions("m")) == 1
    assert len(store.history("m", "prod")) == 1


def test_a_new_version_takes_the_aliases(store: Store, tmp_path: Path) -> None:
    name_bundle(store, SPEC, publish(store, "one", tmp_path))
    two = publish(store, "two", tmp_path)
    assert name_bundle(store, SPEC, two) == Naming(2, ("prod", "canary"), ())
    assert store.aliases("m")["prod"].fingerprint == two.fingerprint


def test_a_repeated_build_does_not_undo_a_rollback(store: Store, tmp_path: Path) -> None:
    one, two = (publish(store, content, tmp_path) for content in ("one", "two"))
    name_bundle(store, SPEC, one)
    name_bundle(store, SPEC, two)
    store.roll_back("m", "prod", reason="it babbles", rejected=two.fingerprint)
    assert name_bundle(store, SPEC, two) == Naming(2, ("canary",), ("prod",))
    assert store.aliases("m")["prod"].fingerprint == one.fingerprint


def test_builds_of_one_name_that_are_repeated_in_turn_change_nothing(store: Store, tmp_path: Path) -> None:
    one, two = (publish(store, content, tmp_path) for content in ("one", "two"))
    for bundle in (one, two):
        name_bundle(store, SPEC, bundle)
    store.roll_back("m", "prod", reason="it babbles", rejected=two.fingerprint)
    for _ in range(2):
        assert name_bundle(store, SPEC, one) == Naming(1, ("prod",), ("canary",))
        assert name_bundle(store, SPEC, two) == Naming(2, ("canary",), ("prod",))
    assert len(store.versions("m")) == 2


def test_a_build_that_was_killed_before_its_aliases_were_moved_moves_them(store: Store, tmp_path: Path) -> None:
    name_bundle(store, SPEC, publish(store, "one", tmp_path))
    two = publish(store, "two", tmp_path)
    store.add_version("m", two.fingerprint)
    assert name_bundle(store, SPEC, two) == Naming(2, ("prod", "canary"), ())


def test_an_alias_that_is_new_in_the_specification_is_made(store: Store, tmp_path: Path) -> None:
    bundle = publish(store, "one", tmp_path)
    name_bundle(store, parse_spec({"name": "m"}), bundle)
    assert name_bundle(store, SPEC, bundle).aliases == ("prod", "canary")


def test_a_fallback_takes_an_alias_from_nobody(store: Store, tmp_path: Path) -> None:
    one, two = (publish(store, content, tmp_path) for content in ("one", "two"))
    name_bundle(store, parse_spec({"name": "m", "aliases": ["prod"]}), one)
    assert name_bundle(store, SPEC, two, "step compile: no") == Naming(2, ("canary",), ("prod",))
    assert store.versions("m")[-1].note == "fallback: step compile: no"
    assert store.aliases("m")["prod"].fingerprint == one.fingerprint
