"""What a rank has of a model, and that all ranks together compute what the whole model does."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as library_logging

from serve.engines.transformers.collectives import TensorGroup
from serve.engines.transformers.loading import LoadedModel, load_model
from serve.engines.transformers.rendezvous import TensorRank, open_store, visit_store
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.sharding import Shard, make_plan
from serve.errors import ConfigError
from tests.unit.engines.transformers.tiny_model import TINY

SETTINGS = TransformersSettings(device="cpu", tokens_per_block=8, num_threads=1, kv_cache_bytes=1 << 20)
FOUR_KV_HEADS = {**TINY, "num_key_value_heads": 4}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**FOUR_KV_HEADS),
    "a vocabulary that does not divide, tied": LlamaConfig(
        **{**FOUR_KV_HEADS, "vocab_size": 301, "tie_word_embeddings": True}
    ),
    "biases of all projections": LlamaConfig(**FOUR_KV_HEADS, attention_bias=True, mlp_bias=True),
    "biases of some": Qwen2Config(**FOUR_KV_HEADS),
    "norms of heads": Qwen3Config(**FOUR_KV_HEADS, head_dim=8),
    "sliding windows": Gemma3TextConfig(**FOUR_KV_HEADS, head_dim=16, sliding_window=8),
    "projections in one": Phi3Config(**FOUR_KV_HEADS, pad_token_id=0),
}


def save_model(directory: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # biases, too, which are zero in a fresh model
    library_logging.disable_progress_bar()
    model.save_pretrained(directory)
    return directory


def load_shards(model_dir: Path, count: int) -> list[LoadedModel]:
    """Load every rank's shard in this process, each on a thread of its own."""
    store, port = open_store("127.0.0.1")

    def load(rank: int) -> LoadedModel:
        who = TensorRank(rank, count, "127.0.0.1", port, None, 60.0)
        return load_model(model_dir, SETTINGS, TensorGroup(who, visit_store(who), torch.device("cpu"), 60.0))

    with ThreadPoolExecutor(count) as pool:
        loaded = list(pool.map(load, range(count)))
    del store
    return loaded


def logits_of(models: list[LoadedModel], tokens: torch.Tensor) -> torch.Tensor:
    """Return rank 0's logits of a forward pass of all ranks."""

    def forward(loaded: LoadedModel) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = loaded.model(tokens).logits
        return logits

    with ThreadPoolExecutor(len(models)) as pool:
        return next(iter(list(pool.map(forward, models))))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "count"), [*((kind, 2) for kind in MODELS), ("llama", 4)])
def test_all_shards_together_compute_what_the_model_does(kind: str, count: int, tmp_path: Path) -> None:
    save_model(tmp_path, MODELS[kind])
    tokens = torch.arange(1, 30).unsqueeze(0)
    whole = load_model(tmp_path, SETTINGS)
    with torch.inference_mode():
        expected = whole.model(tokens).logits
    logits = logits_of(load_shards(tmp_path, count), tokens)
    assert logits.shape == expected.shape
    assert torch.allclose(logits, expected, atol=1e-4), (logits - expected).abs().max()


def test_a_rank_has_its_part_of_the_weights_and_of_the_cache(tmp_path: Path) -> None:
    save_model(tmp_path, MODELS["llama"])
    whole = load_model(tmp_path, SETTINGS)
    shards = load_shards(tmp_path, 2)
    embeddings = whole.model.get_input_embeddings().weight.numel()
    norms = sum(p.numel() for p in whole.model.parameters() if p.dim() == 1)
    split = sum(p.numel() for p in whole.model.parameters()) - embeddings - norms
    for shard in shards:
        assert sum(p.numel() for p in shard.model.parameters()) == embeddings + norms + split // 2
        assert shard.num_blocks == 2 * whole.num_blocks  # of as many bytes on each rank, with half of the heads
        assert shard.vocab_size == whole.vocab_size


@given(size=st.integers(0, 300), count=st.integers(1, 16))
def test_shards_cover_every_row_once(size: int, count: int) -> None:
    bounds = [Shard(index, count).bounds(size) for index in range(count)]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(size))
    assert max(stop - start for start, stop in bounds) == bounds[0][1] - bounds[0][0]


REFUSED: dict[str, tuple[Any, int, str]] = {
    "KV heads": (LlamaConfig(**TINY), 4, "num_key_value_heads=2"),
    "heads": (LlamaConfig(**{**TINY, "hidden_size": 66, "num_attention_heads": 3}, head_dim=22), 2, "heads"),
    "inner size": (LlamaConfig(**{**TINY, "intermediate_size": 129}), 2, "129 outputs"),
    "no plan": (GPT2Config(n_layer=1, n_head=2, n_embd=32), 2, "no tensor-parallel plan"),
    "experts": (MixtralConfig(**TINY, num_local_experts=2), 2, "packed_colwise"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_split_is_refused_with_a_remedy(kind: str) -> None:
    config, count, what = REFUSED[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError) as raised:
        make_plan(model, config, count)
    message = str(raised.value)
    assert all(part in message for part in (what, repr(config.model_type), f"tensor={count}", "tensor: 1")), message


def refused(model_dir: Path) -> str:
    """Load one of two shards, whose rank need not meet the other to see what is wrong."""
    group = TensorGroup.__new__(TensorGroup)
    group.rank, group.world_size, group.device = 0, 2, torch.device("cpu")
    with pytest.raises(ConfigError) as raised:
        load_model(model_dir, SETTINGS, group)
    return str(raised.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), MODELS["llama"])


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_quantized_checkpoint_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantized" in refused(copy)


def test_a_checkpoint_without_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert "convert the checkpoint to safetensors" in refused(copy)


def test_weights_of_another_shape_than_the_config_says_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    assert str(copy) in refused(copy)
