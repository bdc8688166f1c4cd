"""The transformers engine passes the conformance suite, with each kind of attention and with prompts in chunks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.engines.protocol import Engine
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits
from tests.unit.engines.transformers.tiny_model import VOCAB_SIZE, make_tiny_model

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "paged": {"attention": "paged", "max_num_tokens": 256},
    "chunked": {"attention": "paged", "max_num_tokens": 20, "max_batch_size": 16, "tokens_per_block": 4},
    "sdpa": {"attention": "sdpa", "max_num_tokens": 128},
    "unshared": {"attention": "paged", "prefix_sharing": False},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine_case(request: pytest.FixtureRequest, checkpoint: Path) -> EngineCase:
    configuration: dict[str, Any] = {
        "device": "cpu",
        "num_threads": 1,
        "tokens_per_block": 8,
        "kv_cache_tokens": 8192,
        **CONFIGURATIONS[request.param],
    }

    def make_engine(limits: EngineLimits | None = None) -> TransformersEngine:
        limits = limits or EngineLimits()
        asked: dict[str, Any] = {"max_batch_size": limits.max_running, "max_waiting": limits.max_waiting}
        if limits.total_blocks is not None:
            asked["kv_cache_tokens"] = limits.total_blocks * configuration["tokens_per_block"]
        given = {name: value for name, value in asked.items() if value is not None}
        return TransformersEngine(checkpoint, TransformersSettings(**{**configuration, **given}))

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, TransformersEngine)
        _break(engine)

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, TransformersEngine)
        return engine.cache_content()

    return EngineCase(
        make_engine=make_engine,
        token_ids=range(VOCAB_SIZE),
        shares_prefixes=configuration.get("prefix_sharing", True),
        kill=kill,
        cache_content=cache_content,
    )


def _break(engine: TransformersEngine) -> None:
    """Let the next step fail, as it would if the GPU was lost."""

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device lost")

    steps: Any = engine._thread and engine._thread.steps
    broken: Callable[..., None] = lost
    steps._batcher._model.forward = broken


class TestTransformersEngine(EngineConformance):
    pass
