"""What a build file refers to, and what makes two builds the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from builders.context import StepName
from builders.inputs import BuildInputs, code_version, read_inputs
from builders.spec import read_spec
from builders.steps import fetch, publish
from serve.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs/builds").glob("*.yaml"))


def read(directory: Path, **document: Any) -> BuildInputs:
    file = directory / "build.yaml"
    file.write_text(yaml.safe_dump({"name": "m"} | document))
    return read_inputs(file)


def test_a_steps_version_is_read_without_importing_it() -> None:
    assert code_version(StepName.FETCH) == fetch.CODE_VERSION
    assert code_version(StepName.PUBLISH) == publish.CODE_VERSION
    with pytest.raises(LookupError, match=r"tests.unit.fetch does not exist"):
        code_version(StepName.FETCH, "tests.unit")


def test_files_are_relative_to_the_build_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    inputs = read(tmp_path, verify={"texts": {"file": "mine.jsonl"}})
    assert inputs.user_files == {"mine.jsonl": b'{"text": "a"}\n'}


def test_the_store_is_the_commands_the_files_or_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRT_STORE", "/environment")
    assert read(tmp_path, store="/file").spec.store == "/file"
    assert read(tmp_path).spec.store == "/environment"
    assert read_inputs(tmp_path / "build.yaml", "/command").spec.store == "/command"
    monkeypatch.delenv("RAYTRT_STORE")
    assert read(tmp_path).spec.store == "~/.raytrt/store"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"verify": {"texts": {"file": "none.jsonl"}}}, r"file: .*/none.jsonl: No such file"),
        ({"verify": {"texts": {"file": "."}}}, r"file: .*: Is a directory"),
        ({"quantize": "fp8"}, r"quantize.recipe: 'fp8' cannot be loaded from a transformers-checkpoint"),
        ({"source": "/none"}, r"source.location: /none is no directory"),
        ({"quantise": "fp8"}, r"quantise"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **document)


@pytest.mark.parametrize(
    "document",
    [{"name": "other"}, {"store": "/elsewhere"}, {"aliases": ["prod"]}, {"target": {"max_retries": 0}}],
)
def test_names_and_how_it_is_built_make_no_other_build(tmp_path: Path, document: dict[str, Any]) -> None:
    assert read(tmp_path, **document).key == read(tmp_path).key


@pytest.mark.parametrize(
    "document",
    [{"target": {"accelerator": "L4"}}, {"verify": {"golden_samples": 1}}, {"engine": {"max_batch_size": 3}}],
)
def test_what_shapes_the_bundle_makes_another_build(tmp_path: Path, document: dict[str, Any]) -> None:
    assert read(tmp_path, **document).key != read(tmp_path).key


def test_the_content_of_a_file_is_part_of_the_build_and_its_name_is_not(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    keys = [read(tmp_path, verify={"texts": {"file": name}}).key for name in ("a", "b", "c")]
    assert len(set(keys)) == 3  # the name is in the specification, which the key takes as it is
    fingerprints = [read(tmp_path, verify={"texts": {"file": name}}).digests[name] for name in ("a", "b", "c")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_examples_are_good(file: Path) -> None:
    assert read_spec(file).name


def test_there_are_examples_of_every_kind() -> None:
    assert {read_spec(file).kind.value for file in CONFIGS} == {
        "transformers-checkpoint", "trtllm-checkpoint", "tensorrt-engine",
    }  # fmt: skip


def test_a_store_is_beside_the_build_file(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    for said, meant in [("./here", str(tmp_path / "here")), ("s3://b/x", "s3://b/x"), ("/there", "/there")]:
        file.write_text(f"name: m\nstore: {said}\n")
        assert read_inputs(file).spec.store == meant
    assert read_inputs(file, "./mine").spec.store == "./mine"  # of the command line, so of the shell's directory


def test_a_wrong_engine_setting_is_named_with_its_section(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("name: m\nengine: {max_batch: 3}\n")
    with pytest.raises(ConfigError, match=r"build.yaml: engine.max_batch: there is no such setting; [^{]*$"):
        read_inputs(file)
