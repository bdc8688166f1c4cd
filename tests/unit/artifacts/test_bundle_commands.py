"""`raytrt bundles`, on a store in a directory."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from serve import bundle_commands
from serve.artifacts.bundle_check import verify_directory
from serve.artifacts.store import Store, open_store
from serve.errors import ConfigError
from tests.unit.artifacts.fakes import manifest_fields, print_of, write_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two bundles of a name, and an alias that went from the first to the second."""
    store = open_store(str(tmp_path / "store"))
    changes: list[dict[str, Any]] = [
        {"quantization": {"recipe": "none"}},
        {"quantization": {"recipe": "int8"}, "certificates": {"accuracy_drop": 0.0012, "output_tokens_per_s": 1234.5}},
    ]
    for label, change in zip(("one", "two"), changes, strict=True):
        directory = write_files(tmp_path / label, {"model/weights": label.encode() * 1000, "runtime.json": b"{}"})
        store.publish_bundle(manifest_fields(label, **change), directory)
        store.add_version("model", print_of(label), f"note of [{label}]")
        store.move_alias("model", "prod", print_of(label), reason=f"because of {label}")
    return store


class Command:
    """Runs `raytrt bundles`."""

    def __init__(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        self.store = store
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> str:
        parser = argparse.ArgumentParser()
        bundle_commands.add_arguments(parser)
        action, *rest = words
        assert bundle_commands.run(parser.parse_args([action, "--store", self.store.url, *rest])) == status
        captured = self._capsys.readouterr()
        return captured.out + captured.err

    def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def bundles(store: Store, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(store, capsys)


def test_bundles_are_listed_with_what_they_are(bundles: Command) -> None:
    lines = bundles("list").splitlines()
    assert lines[0].split() == (
        ["bundle", "fingerprint", "kind", "quantization", "size", "accuracy", "drop", "tokens/s", "aliases", "made"]
    )
    assert lines[1].split()[:5] == ["model@1", print_of("one")[:12], "transformers-checkpoint", "none", "2.9"]
    for text in ("model@2", "int8", "0.12 %", "1,234", "latest, prod"):
        assert text in lines[2]
    rows = bundles.json("list", "model")
    assert [(row["name"], row["number"], row["aliases"]) for row in rows] == [
        ("model", 1, []),
        ("model", 2, ["latest", "prod"]),
    ]
    assert rows == bundles.json("versions", "model")
    assert rows[1]["note"] == "note of [two]"


def test_an_empty_store_says_how_to_fill_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = Command(open_store(str(tmp_path / "empty")), capsys)
    assert "has no bundles; make one by `raytrt build`" in empty("list")
    assert empty.json("list") == []


def test_a_bundle_is_shown(bundles: Command) -> None:
    bundles.store.use(print_of("two"), "deployment llm")
    shown = bundles("show", "model@prod", "--files")
    for text in (print_of("two"), "int8", "0.12 %", "deployment llm", "model/weights", "runtime.json"):
        assert text in shown
    assert bundles.json("show", "model@1")["fingerprint"] == print_of("one")


def test_differences_are_shown(bundles: Command) -> None:
    shown = bundles("diff", "model@1", "model@2")
    for text in ("quantization.recipe", "int8", "certificates.accuracy_drop", "files.model/weights", "3000 bytes"):
        assert text in shown
    assert "runtime.json" not in shown
    assert {item["key"] for item in bundles.json("diff", "model@1", "model@2")} >= {"fingerprint", "model.source"}
    assert bundles("diff", "model@2", "model").strip() == "no difference"


def test_aliases_are_moved_and_rolled_back(bundles: Command) -> None:
    assert f"model@stage -> {print_of('one')[:12]}" in bundles("promote", "model@1", "stage")
    assert bundles.json("promote", "model@2", "stage", "--reason", "[why] not")["reason"] == "[why] not"
    assert "[why] not" in bundles("history", "model@stage")
    assert f"model@stage -> {print_of('one')[:12]}" in bundles("rollback", "model@stage", "--reject")
    moves = bundles.json("history", "model@stage")
    assert [move["fingerprint"] for move in moves] == [print_of("one"), print_of("two"), print_of("one")]
    assert moves[-1]["rejected"] == print_of("two")
    with pytest.raises(ConfigError, match="no other bundle"):
        bundles("rollback", "model@stage")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show", "other"], r"no bundle named 'other'; it has: model"),
        (["list", "other"], r"no bundle named 'other'; it has: model"),
        (["promote", "model@3", "prod"], r"no version '3'; versions of model: 1 \(.*\), 2 \(.*\); aliases: prod"),
        (["promote", "model@1", "latest"], "moves by itself"),
        (["history", "model@stage"], r"no alias 'stage'; it has: prod"),
        (["history", "model"], "names no alias; write name@alias, for instance model@prod"),
        (["rollback", "model@stage"], "there is no alias 'stage'"),
        (["diff", "model@1", "no such/reference@"], "is no reference of a bundle"),
        (["export", "model@1", "."], "is there and not empty"),
    ],
)
def test_mistakes_are_told_with_what_there_is(bundles: Command, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bundles(*words)


def test_garbage_is_collected(bundles: Command) -> None:
    unneeded = ["--keep-versions", "0"]
    assert bundles.json("gc", "--dry-run", *unneeded) == {
        "bundles": [],
        "steps": [],
        "blobs": 0,
        "size_bytes": 0,
        "dry_run": True,
    }
    assert "0 bundles, 0 steps, 0 blobs, 0 B removed" in bundles("gc", *unneeded)


def test_bundles_are_verified_and_exported(bundles: Command, tmp_path: Path) -> None:
    assert "is good: 2 files" in bundles("verify", "model@2")
    bundles("export", "model@2", str(tmp_path / "out"))
    assert verify_directory(tmp_path / "out").fingerprint == print_of("two")
    assert bundles.json("verify", str(tmp_path / "out"))["good"] is True
    (tmp_path / "out" / "runtime.json").write_bytes(b"[]")
    assert "runtime.json has BLAKE3" in bundles("verify", str(tmp_path / "out"), status=1)


def test_an_export_that_was_broken_off_goes_on(bundles: Command, tmp_path: Path) -> None:
    blob = next(path for path in (tmp_path / "store" / "blobs").glob("*/*") if path.stat().st_size == 3000)
    content = blob.read_bytes()
    blob.unlink()
    of_one = bool(bundles.store.find_damage(found(bundles.store, "one").files))
    reference, other = ("model@1", "model@2") if of_one else ("model@2", "model@1")
    assert "is missing" in bundles("export", reference, str(tmp_path / "out"), status=1)
    blob.write_bytes(content)
    with pytest.raises(ConfigError, match="is there and not empty"):
        bundles("export", other, str(tmp_path / "out"))
    bundles("export", reference, str(tmp_path / "out"))
    assert "is good" in bundles("verify", str(tmp_path / "out"))


def test_damage_is_found_and_removed_so_that_it_can_be_mended(bundles: Command, tmp_path: Path) -> None:
    blob = next(path for path in (tmp_path / "store" / "blobs").glob("*/*") if path.stat().st_size == 3000)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 3000)
    (label,) = (label for label in ("one", "two") if bundles.store.find_damage(found(bundles.store, label).files))
    reference = "model@1" if label == "one" else "model@2"
    assert "model/weights has BLAKE3" in bundles("verify", reference, status=1)
    assert bundles.json("verify", reference, "--remove-damaged", status=1)["good"] is False
    assert "model/weights is missing" in bundles("verify", reference, status=1)
    bundles.store.publish_bundle(manifest_fields(label), tmp_path / label)
    assert "is good" in bundles("verify", reference)


def found(store: Store, label: str) -> Any:
    return store.find_bundle(print_of(label))


def test_a_store_that_does_not_answer_is_told(bundles: Command, tmp_path: Path) -> None:
    (tmp_path / "store" / "names" / "model" / "versions" / "00000002.json").write_bytes(b"")
    assert "is no record of a store" in bundles("list", status=1)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"store: .*/file is a file; name a directory"):
        open_store(str(tmp_path / "file"))
