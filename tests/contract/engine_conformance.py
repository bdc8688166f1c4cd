"""The conformance suite of the `Engine` port: what every adapter has to do, and how a new one is put to the test.

A test module for an adapter is a fixture and a class:

    @pytest.fixture(scope="module")
    def engine_case() -> EngineCase:
        return EngineCase(make_engine=..., token_ids=range(10, 500), ...)

    class TestMyEngine(EngineConformance):
        pass

`EngineCase` says what the suite has to know about an adapter. Tests that share one engine use prompts of their own, so
that no test finds another one's prefix in the cache; tests that need a fresh or a dying engine make it.
"""

import pytest

from tests.contract.engine_conformance_cache import CacheConformance
from tests.contract.engine_conformance_lifecycle import LifecycleConformance
from tests.contract.engine_conformance_sampling import SamplingConformance
from tests.contract.engine_conformance_streams import StreamConformance


@pytest.mark.asyncio(loop_scope="module")
class EngineConformance(StreamConformance, SamplingConformance, CacheConformance, LifecycleConformance):
    """All of it. Subclass it in a module that has an `engine_case` fixture."""
