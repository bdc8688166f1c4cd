"""The command line of builds, as far as it needs no Ray."""

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from builders import cli
from builders.build import Built
from builders.errors import BuildFailed, GateRefused
from builders.inputs import read_inputs
from builders.naming import Naming
from builders.reports import failure_to_json, print_built, print_failure
from serve.artifacts.manifest import CertificateSummary, Manifest
from serve.artifacts.store import Store, open_store
from serve.config import BUILTIN_MODELS
from serve.errors import ConfigError

QUICKSTART = BUILTIN_MODELS / "quickstart"


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "build.yaml"
    file.write_text(yaml.safe_dump({"name": "m", "store": str(tmp_path / "store"), "aliases": ["prod"]}))
    return file


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def publish(store: Store, directory: Path, **fields: Any) -> Manifest:
    (directory / "model").mkdir(parents=True)
    (directory / "model/weights").write_text("w")
    manifest = {
        "fingerprint": "a" * 64,
        "name": "m",
        "kind": "transformers-checkpoint",
        "model": {"source": "s", "digest": "d", "architecture": "A"},
        "provenance": {"created": "2026-01-01T00:00:00+00:00", "raytrt": "0"},
        "certificates": CertificateSummary(greedy_agreement=0.99).model_dump(),
    }
    return store.publish_bundle(manifest | fields, directory)


def test_an_outline_is_a_table_or_json(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(options(str(spec), "--dry-run")) == cli.OK
    table = capsys.readouterr().out
    for step in ("fetch", "reference", "tune", "verify", "publish"):
        assert any(line.startswith(step) and "to run" in line for line in table.splitlines())
    assert cli.run(options(str(spec), "--dry-run", "--json")) == cli.OK
    outline = json.loads(capsys.readouterr().out)
    assert [step["state"] for step in outline["steps"]] == ["run"] * 5
    assert outline["steps"][-1]["fingerprint"] == outline["fingerprint"]


@pytest.mark.parametrize("kind", ["transformers-checkpoint", "trtllm-checkpoint"])
def test_a_layout_that_the_model_cannot_have_is_told_before_anything_is_done(
    kind: str, tmp_path: Path, store: Store
) -> None:
    file = tmp_path / "build.yaml"
    build = {"name": "m", "kind": kind, "store": store.url, "parallel": {"tensor": 3}}
    file.write_text(yaml.safe_dump(build))
    for words in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"parallel.tensor: .*heads"):
            cli.run(options(str(file), *words))


def test_a_damaged_checkpoint_is_told_before_anything_is_done(spec: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(QUICKSTART, checkpoint)
    with (checkpoint / "model.safetensors").open("ab") as weights:
        weights.write(b"x")
    spec.write_text(spec.read_text() + f"source: {checkpoint}\n")
    for words in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=r"model.safetensors of .* is no whole safetensors file"):
            cli.run(options(str(spec), *words))


def test_a_build_that_was_done_is_found_without_ray(
    spec: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = publish(store, tmp_path / "bundle")
    store.record_build(read_inputs(spec).key, manifest.fingerprint)
    assert cli.run(options(str(spec), "--json")) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["fingerprint"], found["version"]) == ("found", manifest.fingerprint, 1)
    assert found["aliases"] == ["prod"]
    assert cli.run(options(str(spec))) == cli.OK
    text = capsys.readouterr().out
    assert "m@1 (transformers-checkpoint, 1e-09 GB): built before, nothing to do" in text
    assert "greedy agreement: 99.0 %" in text
    assert f"    bundle: {store.url}/m@prod" in text


def test_neither_ray_nor_torch_is_imported_before_there_is_work() -> None:
    program = (
        "import sys, builders.cli; "
        "sys.exit(bool({'ray', 'torch', 'transformers', 'modelopt', 'huggingface_hub'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_mistake_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("name: m\nquantise: fp8\n")
    with pytest.raises(ConfigError, match="quantise"):
        cli.run(options(str(file)))
    done = subprocess.run([sys.executable, "-m", "builders", str(file)], capture_output=True, text=True)
    assert done.returncode == cli.MISTAKE
    assert "quantise" in done.stderr
    assert "Traceback" not in done.stderr


def text_of(report: Any, *arguments: Any, **named: Any) -> str:
    output = io.StringIO()
    report(Console(file=output, width=200), *arguments, **named)
    return output.getvalue()


def test_a_fallback_and_an_alias_that_was_left_are_told(store: Store, tmp_path: Path) -> None:
    manifest = publish(store, tmp_path / "bundle")
    built = Built(manifest, store.url, "m", Naming(2, (), ("prod",)), made=True, replaces="step compile: no")
    text = text_of(print_built, built)
    assert "This is the fallback, unquantized, because the build failed: step compile: no" in text
    assert f"@prod points to another bundle, and was left there; raytrt bundles promote {store.url}/m@2 prod" in text
    assert f"bundle: {store.url}/m@2" in text


def test_a_failure_shows_the_end_of_its_log() -> None:
    failure = BuildFailed(
        "tune", "it cannot be done", tuple(f"line {number}" for number in range(100)), "/logs/tune.log"
    )
    short, long = (text_of(print_failure, failure, verbose=verbose) for verbose in (False, True))
    assert "line 74" not in short
    assert "line 75" in short
    assert "line 0" in long
    for text in (short, long):
        assert "raytrt build: step tune: it cannot be done" in text
        assert "Its log: /logs/tune.log" in text
    assert failure_to_json(failure)["status"] == "failed"


def test_a_refusal_shows_where_its_reports_are() -> None:
    refusal = GateRefused("verify", "accuracy drop 3 % > 1 %", log="/logs/refused")
    assert "Its reports: /logs/refused" in text_of(print_failure, refusal, verbose=False)
    assert failure_to_json(refusal)["status"] == "refused"


def test_errors_survive_their_way_from_another_process() -> None:
    for error in (BuildFailed("tune", "no", ("a",), "log", True), GateRefused("verify", "no")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, str(again)) == (type(error), error.args, str(error))
        assert (again.step, again.tail, again.log, again.mistake) == (error.step, error.tail, error.log, error.mistake)
