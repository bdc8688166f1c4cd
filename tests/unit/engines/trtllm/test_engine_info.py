"""Sizes that requests have to fit, from the model, the settings and a built engine."""

from pathlib import Path
from typing import Any

import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm.arguments import EnginePlan, plan_engine
from serve.engines.trtllm.engine_info import Limits, check_capacity, engine_info, engine_limits
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.model_directory import BuiltEngine, DirectoryKind, ModelDirectory
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

CONFIG = {"vocab_size": 1000, "max_position_embeddings": 4096}


def plan(settings: TrtllmSettings, built: BuiltEngine | None = None) -> EnginePlan:
    kind = DirectoryKind.ENGINE if built else DirectoryKind.HUGGING_FACE
    model = ModelDirectory(Path("/models/m"), kind, None, built)
    return plan_engine(settings, ParallelLayout(), Orchestration(), model, Line.V1_2)


def limits(config: dict[str, Any], built: BuiltEngine | None = None, **values: Any) -> Limits:
    settings = TrtllmSettings.model_validate(values)
    return engine_limits(plan(settings, built), settings, config)


def test_a_checkpoint_tells_its_vocabulary_and_context() -> None:
    assert limits(CONFIG) == Limits(4096, 1000, 32, 2048, None)
    assert limits({"text_config": CONFIG}, context_tokens=512).context_tokens == 512
    assert limits(CONFIG, max_batch_size=7, kv_cache={"tokens_per_block": 64}) == Limits(4096, 1000, 64, 7, None)


def test_prompts_have_to_fit_a_step_without_chunks() -> None:
    assert limits(CONFIG, chunked_prefill=False).step_tokens == 8192
    assert limits(CONFIG, chunked_prefill=False, max_num_tokens=4000).step_tokens == 4000


def test_a_built_engine_fixes_its_sizes() -> None:
    built = BuiltEngine("1.2.1", 1, 1, 1, 16, 2048, 777, 64)
    config = {"pretrained_config": CONFIG, "build_config": {}}
    found = limits(config, built, kv_cache={"tokens_per_block": 64}, chunked_prefill=False)
    assert found == Limits(777, 1000, 64, 16, 2048)


@pytest.mark.parametrize("lacking", ["vocab_size", "max_position_embeddings"])
def test_a_config_that_does_not_tell_is_refused(lacking: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != lacking}
    with pytest.raises(ConfigError, match=lacking):
        limits(config)


def test_what_an_engine_says_of_itself() -> None:
    info = engine_info("1.2.1", plan(TrtllmSettings()), limits(CONFIG), 99)
    assert (info.engine, info.total_blocks, info.vocab_size) == ("tensorrt-llm 1.2.1 (pytorch)", 99, 1000)


def test_trap_7_3_21_a_tiny_kv_cache_is_told_or_refused() -> None:
    sizes = limits(CONFIG)
    assert check_capacity(TrtllmSettings(), sizes, 128) is None
    warning = check_capacity(TrtllmSettings(), sizes, 127)
    assert warning is not None
    assert "4064" in warning
    wanting = TrtllmSettings.model_validate({"kv_cache": {"min_tokens": 8192}})
    with pytest.raises(ConfigError, match="4096 tokens"):
        check_capacity(wanting, sizes, 128)
