"""The simulated engine passes the conformance suite: in real time, as fast as possible, and under preemption."""

from typing import Any

import pytest

from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits

FAST = FixedLatencySettings(prefill_tokens_per_s=2e6, decode_step_s=5e-4)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "real time": {"latency": FAST, "max_num_tokens": 512, "max_batch_size": 64},
    "at once": {"latency": FixedLatencySettings(), "max_num_tokens": 300, "max_batch_size": 64},
    "preempting": {"latency": FAST, "scheduling": "max_utilization", "max_batch_size": 64},
    "whole prompts": {"latency": FAST, "chunked_prefill": False, "tokens_per_block": 16, "max_batch_size": 8},
}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine_case(request: pytest.FixtureRequest) -> EngineCase:
    configuration = {"vocab_size": 1000, "context_tokens": 4096, **CONFIGURATIONS[request.param]}

    def make_engine(limits: EngineLimits | None = None) -> SimulatedEngine:
        limits = limits or EngineLimits()
        return SimulatedEngine(SimulatedSettings(**{**configuration, **limits.queue, **limits.blocks}))

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, SimulatedEngine)
        engine.inject(Fault(kind="die"))

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, SimulatedEngine)
        return engine.cache_content()

    return EngineCase(make_engine=make_engine, token_ids=range(1000), kill=kill, cache_content=cache_content)


class TestSimulatedEngine(EngineConformance):
    pass
