"""`raytrt explain` and `raytrt check`: what would run, as it would be placed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.cli import main
from serve.config import parse_app_config
from serve.errors import ConfigError
from serve.explain_config import explain_file

TRTLLM = {"id": "m", "engine": {"kind": "trtllm"}}


def write(tmp_path: Path, *models: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"applications": [{"import_path": "serve.app:build_app", "args": {"models": list(models)}}]})
    )
    return path


def test_the_placement_is_that_of_the_replicas(tmp_path: Path) -> None:
    resources = {"num_cpus": 2, "accelerator_type": "H100"}
    path = write(tmp_path, TRTLLM | {"parallel": {"tensor": 4}, "resources": resources})
    text = explain_file(path, "newest").text
    assert "# placement: STRICT_PACK [{'CPU': 8.5, 'GPU': 4.0, 'accelerator_type:H100': 0.001}]" in text
    assert "serve/models/quickstart'" in text


@pytest.mark.parametrize(
    "apart", [{"engine_env": {"py_executable": "/opt/trtllm/bin/python"}}, {"fallback": "transformers"}]
)
def test_an_engine_of_its_own_process_has_its_own_bundle(tmp_path: Path, apart: dict[str, Any]) -> None:
    text = explain_file(write(tmp_path, TRTLLM | {"parallel": {"tensor": 2}} | apart)).text
    assert "# placement: STRICT_PACK [{'CPU': 0.5}, {'CPU': 2.0, 'GPU': 2.0}]" in text


def test_arguments_and_single_models_are_explained_too(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    whole = explain_file(write(tmp_path, TRTLLM))
    for part in ({"models": [TRTLLM]}, TRTLLM):
        path.write_text(yaml.safe_dump(part))
        assert explain_file(path) == whole
    path.write_text("kind: trtllm")
    assert explain_file(path).works


@pytest.mark.parametrize(
    "document",
    [
        {"applications": 1},
        {"applications": [1]},
        {"models": {"m": 1}},
        {"models": [1]},
        {"models": [{"id": "m", "engine": ["trtllm"]}]},
        {"engine": ["trtllm"]},
        [1],
        {"models": [TRTLLM, TRTLLM]},
        {"models": [TRTLLM | {"resources": {"num_gpus": 2}}]},
    ],
)
def test_what_check_refuses_is_not_explained(tmp_path: Path, document: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(document))
    assert main(["explain", str(path)]) == 2
    assert capsys.readouterr().err.startswith("raytrt: ")


UNUSABLE = [
    ({"extra": {"no_such_keyword": 1}}, "no_such_keyword"),
    ({"speculation": {"kind": "draft_model", "model": "org/draft"}}, "'org/draft' is no absolute path"),
    ({"pipeline_layers": [1, 2]}, "2 numbers for parallel.pipeline=1 stages"),
    ({"quantization": {"algorithm": "FP8"}}, "quantization"),
]


@pytest.mark.parametrize(("settings", "reason"), UNUSABLE)
def test_what_neither_line_can_run_is_not_good(
    tmp_path: Path, settings: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, TRTLLM | {"engine": {"kind": "trtllm", **settings}})
    assert main(["check", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count(reason) >= 2
    assert "TensorRT-LLM 1.2.x: " in told
    assert "TensorRT-LLM newest: " in told
    assert main(["explain", str(path)]) == 2


def test_check_tells_the_line_and_warns_of_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TRTLLM | {"engine": {"kind": "trtllm", "model_overrides": {"a": 1}}, "resources": {"num_gpus": 0}}
    assert main(["check", str(write(tmp_path, model))]) == 0
    told = capsys.readouterr()
    assert told.out == "default: m (trtllm newest only): good\n"
    assert "warning: models[m].resources.num_gpus=0" in told.err
    assert main(["check", str(write(tmp_path, TRTLLM))]) == 0
    assert capsys.readouterr().out == "default: m (trtllm): good\n"


def test_directories_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_app_config({"models": [{"id": "m", "model": "org/model", "tokenizer": "texts"}]}).models[0]
    assert config.directory == tmp_path / "org/model"
    assert config.tokenizer_directory == tmp_path / "texts"


def test_nothing_to_explain_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to explain"):
        explain_file(write(tmp_path, {"id": "m"}))
