"""Fixtures of the contract suites. A test module supplies `engine_case`; the rest is derived here."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

for _module in ("case", "streams", "sampling", "cache", "lifecycle"):
    pytest.register_assert_rewrite(f"tests.contract.engine_conformance_{_module}")

from tests.contract.engine_conformance_case import EngineCase, EngineProbe  # noqa: E402  # after the rewrite hook


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def probe(engine_case: EngineCase) -> AsyncIterator[EngineProbe]:
    """One started engine, shared by the module's tests; each of them leaves it idle."""
    engine = engine_case.make_engine()
    await engine.start()
    yield EngineProbe(engine, engine_case)
    await engine.stop()
