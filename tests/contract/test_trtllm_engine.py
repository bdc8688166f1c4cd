"""TrtllmEngine passes the conformance suite on the double of each line and backend of TensorRT-LLM."""

from typing import Any

import pytest

from serve.engines.protocol import Engine
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits
from tests.contract.trtllm_host import HostedTrtllm
from tests.doubles.install import LineName

SIZE = 32
CONFIGURATIONS: dict[str, tuple[LineName, dict[str, Any]]] = {
    "1.2.x pytorch": ("1.2.x", {"sampler": "trtllm"}),
    "1.2.x tensorrt": ("1.2.x", {"backend": "tensorrt", "build": {"prompt_logprobs": True, "logprobs": True}}),
    "newest": ("newest", {}),
}
FAST = {
    "max_batch_size": 16,
    "context_tokens": 1024,
    "kv_cache": {"event_interval_s": 0.02},
    "stats": {"interval_s": 0.1},
}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine_case(request: pytest.FixtureRequest) -> EngineCase:
    line, settings = CONFIGURATIONS[request.param]

    def make_engine(limits: EngineLimits | None = None) -> HostedTrtllm:
        limits = limits or EngineLimits()
        cache = dict(FAST["kv_cache"])  # type: ignore[call-overload]
        if limits.total_blocks is not None:
            cache["max_tokens"] = limits.total_blocks * SIZE
        return HostedTrtllm(line, {**FAST, **settings, **limits.queue, "kv_cache": cache})

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, HostedTrtllm)
        engine.fault("crash", "CUDA error: an illegal memory access was encountered")

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, HostedTrtllm)
        return frozenset(engine.ask("content"))

    return EngineCase(
        make_engine=make_engine,
        token_ids=range(10, 500),
        partial_reuse=True,
        kill=kill,
        cache_content=cache_content,
        max_stall_s=2.0,
    )


class TestTrtllmEngine(EngineConformance):
    pass
