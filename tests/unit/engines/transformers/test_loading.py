"""What is wrong with a checkpoint, or with a wish, is said by file, value and remedy."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.engines.transformers.loading import load_model
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError
from tests.unit.engines.transformers.tiny_model import CONTEXT_TOKENS, VOCAB_SIZE, make_tiny_model

CPU = TransformersSettings(device="cpu", tokens_per_block=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def settings(**values: Any) -> TransformersSettings:
    return TransformersSettings(**{"device": "cpu", "tokens_per_block": 8, **values})


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(directory: Path, wish: TransformersSettings = CPU) -> str:
    with pytest.raises(ConfigError) as raised:
        load_model(directory, wish)
    return str(raised.value)


def test_a_checkpoint_is_loaded_as_its_config_says(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, settings(kv_cache_tokens=1000))
    assert (loaded.context_tokens, loaded.vocab_size, loaded.num_blocks) == (CONTEXT_TOKENS, VOCAB_SIZE, 125)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training


def test_loading_leaves_no_line_on_the_terminal(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(checkpoint, CPU)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    message = refused(copy)
    assert str(copy) in message
    assert name.split(".")[1] in message


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", '{"model_type": "nonesuch"}'])
def test_a_config_that_is_none(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text, encoding="latin-1")
    assert str(copy / "config.json") in refused(copy)


def test_weights_that_are_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(copy) in refused(copy)


def test_weights_that_are_not_all_there(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    message = refused(copy)
    assert "missing keys: model.norm.weight" in message


def test_weights_of_another_shape(copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    assert str(copy) in refused(copy)


def test_an_architecture_that_generates_nothing(copy: Path) -> None:
    edit_config(copy, model_type="vit", architectures=["ViTModel"])
    assert str(copy) in refused(copy)


def test_a_context_beyond_the_models(checkpoint: Path) -> None:
    message = refused(checkpoint, settings(context_tokens=CONTEXT_TOKENS + 1))
    assert str(CONTEXT_TOKENS + 1) in message
    assert str(CONTEXT_TOKENS) in message
    assert load_model(checkpoint, settings(context_tokens=77)).context_tokens == 77


def test_a_gpu_that_is_not_there(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "engine.device: 'cuda'" in refused(checkpoint, settings(device="cuda"))
    wish = settings(device="auto", attention="flash_attention_2")
    assert "engine.attention: 'flash_attention_2'" in refused(checkpoint, wish)


def test_attention_that_the_model_does_not_have(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path)
    edit_config(directory, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    assert "engine.attention: 'paged'" in refused(directory, settings(attention="paged"))
    assert load_model(directory, settings()).model.config._attn_implementation == "sdpa"


def test_the_cache_is_sized_by_bytes(checkpoint: Path) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 4 * 8  # keys and values, layers, heads, dimensions, float32, tokens
    assert load_model(checkpoint, settings(kv_cache_bytes=10 * block_bytes + 5)).num_blocks == 10
    assert "engine.kv_cache_bytes" in refused(checkpoint, settings(kv_cache_bytes=block_bytes))


def test_the_cache_is_bounded_without_a_wish(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, CPU)
    assert CONTEXT_TOKENS // 8 < loaded.num_blocks <= 32_768 // 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_chosen(checkpoint: Path, dtype: str) -> None:
    assert str(load_model(checkpoint, settings(dtype=dtype)).model.dtype) == f"torch.{dtype}"
