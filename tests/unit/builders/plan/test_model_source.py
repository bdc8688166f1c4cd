"""Models by path, name or shape."""

import json
from pathlib import Path

import fsspec
import pytest

from builders.plan.model_source import SHAPE_EXAMPLE, find_model, known_name, parse_shape
from serve.engines.simulated.known_models import CONFIGS, HUB, MODELS
from serve.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "My Model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIGS["qwen3-8b"]))
    return directory


def test_a_directory_and_its_config_are_the_same_model(checkpoint: Path) -> None:
    model = find_model(str(checkpoint))
    assert model == find_model(str(checkpoint / "config.json"))
    assert (model.name, model.location, model.shape) == ("My-Model", str(checkpoint), MODELS["qwen3-8b"])
    by_url = find_model(f"file://{checkpoint}")
    assert by_url.shape == model.shape


def test_a_url_of_any_file_system_is_read(checkpoint: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/models/qwen/config.json", (checkpoint / "config.json").read_bytes())
    model = find_model("memory://models/qwen")
    assert (model.name, model.location, model.shape) == ("qwen", "memory://models/qwen", MODELS["qwen3-8b"])
    with pytest.raises(ConfigError, match=r"memory://models/other/config\.json: .*--shape"):
        find_model("memory://models/other")


def test_the_quickstart_model_is_built_in() -> None:
    model = find_model("builtin:quickstart")
    assert (model.name, model.location) == ("quickstart", "builtin:quickstart")
    assert model.shape.parameters == pytest.approx(3.9e6, rel=0.02)


def test_known_names_have_a_place_on_the_hub() -> None:
    assert HUB.keys() == CONFIGS.keys()
    model = find_model("Llama-3.1-8B")
    assert (model.location, model.shape) == ("hf://meta-llama/Llama-3.1-8B-Instruct", MODELS["llama-3.1-8b"])
    assert find_model("deepseek-r1").is_quantized
    assert find_model("gpt-oss-120b").precisions.weights == "mxfp4"


@pytest.mark.parametrize("name", HUB)
def test_names_on_the_hub_are_known(name: str) -> None:
    assert known_name(HUB[name]) in CONFIGS


def test_without_a_network_the_name_of_a_hubs_model_may_be_enough() -> None:
    model = find_model("hf://Qwen/Qwen3-8B")
    assert (model.location, model.shape) == ("hf://Qwen/Qwen3-8B", MODELS["qwen3-8b"])
    with pytest.raises(ConfigError, match=r"config.json of hf://acme/rocket cannot be read .*give a local directory"):
        find_model("hf://acme/rocket")


def test_a_shape_by_flags() -> None:
    model = find_model("acme-rocket", SHAPE_EXAMPLE + ",tied_embeddings=true")
    assert (model.name, model.location, model.shape.tied_embeddings) == ("acme-rocket", None, True)
    assert parse_shape(SHAPE_EXAMPLE).parameters == pytest.approx(MODELS["llama-3.1-8b"].parameters, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ("layers=32", r"(?s)--shape.hidden: Field required.*write for instance layers=32"),
        (SHAPE_EXAMPLE + ",rockets=1", r"(?s)--shape.rockets: there is no such setting.*experts_per_token"),
        (SHAPE_EXAMPLE + ",layers=many", r"(?s)--shape.layers: .*got 'many'"),
    ],
)
def test_a_wrong_shape_is_refused(shape: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_shape(shape)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("llama-3.1-8", r"known by name \(did you mean llama-3.1-8b"),
        ("./nowhere", "'./nowhere' is no directory and no model that is known by name"),
        ("lama-3.1-8b", "'lama-3.1-8b' is no directory .*llama-3.1-8b"),
        ("builtin:nothing", "there is no builtin:nothing; there is builtin:quickstart"),
    ],
)
def test_an_unknown_model_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find_model(text)


def test_a_model_that_is_not_understood_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    with pytest.raises(ConfigError, match=r"model_type 'mamba2' is none of those .*--shape layers=32"):
        find_model(str(tmp_path))
