"""What the adapter builds on in the library is there, or its absence is said."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import ContinuousBatchingManager

from serve.engines.transformers.ledger import LeastRecentlyUsed, WatchedBlocks, open_ledger
from serve.engines.transformers.library import Batcher, BatchOptions
from serve.engines.transformers.loading import load_model
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError
from tests.unit.engines.transformers.tiny_model import make_tiny_model

OPTIONS = BatchOptions(
    num_blocks=20, tokens_per_block=8, max_batch_size=4, max_num_tokens=32, context_tokens=512, prefix_sharing=True
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_model(directory, TransformersSettings(device="cpu")).model


def choose(logits: torch.Tensor, names: list[str]) -> list[int]:
    return [0] * len(names)


def make_batcher(model: Any) -> Batcher:
    return Batcher(model, OPTIONS, choose, lambda name, tokens: None)


def test_the_cache_has_the_size_asked_for(model: Any) -> None:
    assert make_batcher(model).ledger.total_blocks == OPTIONS.num_blocks


@pytest.mark.parametrize("lost", ["scheduler", "cache", "model_runner"])
def test_a_release_without_a_part_is_refused_by_version(model: Any, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[..., Any] = ContinuousBatchingManager._create_batch_processor

    def without(manager: Any) -> Any:
        processor = make(manager)
        return SimpleNamespace(**{name: part for name, part in vars(processor).items() if name != lost})

    monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", without)  # as a later release may be
    with pytest.raises(ConfigError) as raised:
        make_batcher(model)
    assert transformers.__version__ in str(raised.value)
    assert lost in str(raised.value)


def test_an_unknown_layout_of_blocks_is_refused() -> None:
    for cache in (SimpleNamespace(), SimpleNamespace(cache_allocators={"full": SimpleNamespace()})):
        with pytest.raises(ConfigError, match="not supported"):
            open_ledger(cache)


def test_a_watched_table_notes_every_change() -> None:
    table = WatchedBlocks()
    table[b"a"] = 1
    table[b"b"] = 2
    assert table.pop(b"a") == 1
    assert table.pop(b"a", None) is None
    table.clear()
    assert table.changes == [(b"a", True), (b"b", True), (b"a", False), (b"b", False)]
    assert not table


def test_blocks_come_back_in_the_order_they_were_left() -> None:
    unused = LeastRecentlyUsed()
    for block in (3, 1, 2):
        unused[block] = None
    del unused[3]
    unused[3] = None
    assert [unused.popitem()[0] for _ in range(3)] == [1, 2, 3]
