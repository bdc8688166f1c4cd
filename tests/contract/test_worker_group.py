"""A worker group is an engine like any other: it passes the conformance suite around a simulated one."""

from collections.abc import Sequence
from typing import Any

import pytest

from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.workers.group import WorkerGroup
from serve.workers.group_settings import GroupSettings
from serve.workers.launchers.port import RankObserver, RankProcess
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits

BASE: dict[str, Any] = {
    "vocab_size": 1000,
    "context_tokens": 4096,
    "latency": FixedLatencySettings(prefill_tokens_per_s=2e6, decode_step_s=5e-4),
    "max_num_tokens": 512,
    "max_batch_size": 64,
}


class InlineLauncher:
    """One rank, in this process."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine

    async def launch(self, observer: RankObserver) -> Engine:
        await self.engine.start()
        return self.engine

    def ranks(self) -> Sequence[RankProcess]:
        return ()

    async def end(self, grace_s: float) -> None:
        pass


class InlineGroup(WorkerGroup):
    """A group whose engine the suite can reach."""

    def __init__(self, engine: SimulatedEngine) -> None:
        super().__init__(InlineLauncher(engine), GroupSettings())
        self.inner = engine


@pytest.fixture(scope="module")
def engine_case() -> EngineCase:
    def make_engine(limits: EngineLimits | None = None) -> InlineGroup:
        limits = limits or EngineLimits()
        return InlineGroup(SimulatedEngine(SimulatedSettings(**{**BASE, **limits.queue, **limits.blocks})))

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, InlineGroup)
        engine.inner.inject(Fault(kind="die"))

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, InlineGroup)
        return engine.inner.cache_content()

    return EngineCase(make_engine=make_engine, token_ids=range(1000), kill=kill, cache_content=cache_content)


class TestWorkerGroup(EngineConformance):
    pass
