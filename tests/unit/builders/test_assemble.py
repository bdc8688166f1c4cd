"""The directory of a candidate, from what the steps made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from builders.assemble import assemble, link_tree
from builders.context import StepInput, StepName
from builders.spec import BuildSpec, parse_spec

SOURCE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def made(directory: Path, *names: str, content: str | None = None, **result: Any) -> StepInput:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content if content is not None else f"{directory.name}:{name}")
    directory.mkdir(parents=True, exist_ok=True)
    return StepInput("f" * 64, directory, result)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[StepName, StepInput]:
    """A source, quantized."""
    source = made(tmp_path / "source", *SOURCE, "README.md", files=list(SOURCE))
    quantized = made(tmp_path / "quantized", "config.json", "model.safetensors", "hf_quant_config.json")
    return {StepName.FETCH: source, StepName.QUANTIZE: quantized}


def spec(**changes: Any) -> BuildSpec:
    return parse_spec({"name": "m"} | changes)


def files(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_checkpoint_is_whole_with_its_tokenizer(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    assemble(spec(engine={"max_batch_size": 3}), inputs, tmp_path / "candidate")
    found = files(tmp_path / "candidate")
    assert found["model/config.json"] == "quantized:config.json"  # not the source's
    assert found["model/tokenizer.json"] == "source:tokenizer.json"
    assert found["tokenizer/config.json"] == "source:config.json"
    assert {name for name in found if name.startswith("tokenizer/")} == {
        f"tokenizer/{name}" for name in SOURCE if name != "model.safetensors"
    }
    assert json.loads(found["runtime.json"])["engine"] == {"kind": "transformers", "max_batch_size": 3}
    assert not any("README" in name for name in found)


def test_without_quantization_it_is_the_source(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    assemble(spec(), {StepName.FETCH: inputs[StepName.FETCH]}, tmp_path / "candidate")
    found = files(tmp_path / "candidate")
    assert {name for name in found if name.startswith("model/")} == {f"model/{name}" for name in SOURCE}


def test_an_engine_is_what_was_compiled(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    compiled = made(tmp_path / "compiled", "model/config.json", "model/rank0.engine", "caches/timing.cache")
    inputs[StepName.COMPILE] = compiled
    assemble(spec(kind="tensorrt-engine"), inputs, tmp_path / "candidate")
    found = files(tmp_path / "candidate")
    assert {name for name in found if name.startswith("model/")} == {"model/config.json", "model/rank0.engine"}
    assert found["model/config.json"] == "compiled:model/config.json"
    assert "caches/timing.cache" in found


def test_the_last_word_on_settings_is_tunes(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    for step, size in ((StepName.COMPILE, 1), (StepName.TUNE, 2)):
        runtime = json.dumps({"engine": {"kind": "trtllm", "max_batch_size": size}})
        inputs[step] = made(tmp_path / step.value, "runtime.json", content=runtime)
    assemble(spec(kind="trtllm-checkpoint"), inputs, tmp_path / "candidate")
    runtime = json.loads((tmp_path / "candidate/runtime.json").read_bytes())
    assert runtime["engine"]["max_batch_size"] == 2


def test_certificates_are_verifys_and_the_search_is_kept_beside_them(
    inputs: dict[StepName, StepInput], tmp_path: Path
) -> None:
    runtime = json.dumps({"engine": {"kind": "transformers"}})
    tuned = made(tmp_path / "tune", "tuning.json", "tuning.png", "certificates/performance.json")
    made(tmp_path / "tune", "runtime.json", content=runtime)
    inputs |= {StepName.TUNE: tuned, StepName.VERIFY: made(tmp_path / "verify", "certificates/accuracy.json")}
    assemble(spec(), inputs, tmp_path / "candidate")
    assert {name for name in files(tmp_path / "candidate") if name.startswith("certificates/")} == {
        "certificates/accuracy.json", "certificates/tuning.json", "certificates/tuning.png",
    }  # fmt: skip


def test_nothing_is_copied_and_links_are_followed(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    weights = tmp_path / "source/model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as a hub's cache has it
    assemble(spec(), {StepName.FETCH: inputs[StepName.FETCH]}, tmp_path / "candidate")
    linked = tmp_path / "candidate/model/model.safetensors"
    assert not linked.is_symlink()
    assert os.path.samefile(linked, tmp_path / "blob")


def test_a_tree_is_linked_with_its_folders(inputs: dict[StepName, StepInput], tmp_path: Path) -> None:
    made(tmp_path / "tree", "a", "b/c")
    link_tree(tmp_path / "tree", tmp_path / "other")
    assert files(tmp_path / "other") == files(tmp_path / "tree")
