"""An engine in another process passes the conformance suite through its socket."""

from typing import Any

import pytest

from serve.engines.protocol import Engine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits
from tests.contract.hosted_engine import HostedEngine

# Slow enough that a stream is still running when the first tokens have crossed to a busy process.
STEPS = FixedLatencySettings(prefill_tokens_per_s=1e6, decode_step_s=1e-3)


@pytest.fixture(scope="module")
def engine_case() -> EngineCase:
    configuration: dict[str, Any] = {
        "vocab_size": 1000,
        "context_tokens": 4096,
        "latency": STEPS,
        "max_num_tokens": 512,
        "max_batch_size": 64,
    }

    def make_engine(limits: EngineLimits | None = None) -> HostedEngine:
        limits = limits or EngineLimits()
        return HostedEngine(SimulatedSettings(**{**configuration, **limits.queue, **limits.blocks}))

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, HostedEngine)
        engine.ask("die")

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, HostedEngine)
        return frozenset(engine.ask("content"))

    return EngineCase(make_engine=make_engine, token_ids=range(1000), kill=kill, cache_content=cache_content)


class TestRemoteEngine(EngineConformance):
    pass
