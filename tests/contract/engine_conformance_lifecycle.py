"""Conformance: overload, death, restart and the end of an engine."""

import asyncio

import pytest

from serve.errors import EngineDead, Overloaded
from tests.contract.engine_conformance_cache import own_engine
from tests.contract.engine_conformance_case import GREEDY, EngineCase, EngineLimits, EngineProbe, Transcript, is_idle


class LifecycleConformance:
    """Each test has an engine of its own."""

    async def test_overload_is_refused_and_the_rest_is_served(self, engine_case: EngineCase) -> None:
        if not engine_case.limits_queue:
            pytest.skip("its queue has no limit")
        async with own_engine(engine_case, EngineLimits(max_running=1, max_waiting=2)) as probe:
            prompts = [probe.prompt(12, ("overload", i)) for i in range(12)]
            results = await asyncio.gather(
                *(probe.run(prompt, max_tokens=30, **GREEDY) for prompt in prompts), return_exceptions=True
            )
            refused = [result for result in results if isinstance(result, Overloaded)]
            served = [result for result in results if isinstance(result, Transcript)]
            assert len(refused) + len(served) == 12, results
            assert refused
            assert all(error.retry_after_s > 0 for error in refused)
            assert len(served) >= 2  # the waiting places, at least, were filled
            await probe.until_idle()
            await asyncio.gather(*(probe.run(prompt, max_tokens=3, **GREEDY) for prompt in prompts[:2]))

    async def test_a_waiting_request_that_is_closed_gives_its_place_back(self, engine_case: EngineCase) -> None:
        if not engine_case.limits_queue:
            pytest.skip("its queue has no limit")
        async with own_engine(engine_case, EngineLimits(max_running=1, max_waiting=1)) as probe:
            running = probe.stream(probe.prompt(12, "running"), max_tokens=probe.long, **GREEDY)
            await probe.first_delta(running)
            for i in range(3):
                waiting = asyncio.ensure_future(probe.run(probe.prompt(12, ("waiting", i)), max_tokens=3, **GREEDY))
                await probe.until(lambda: probe.engine.stats().waiting == 1, "waiting")
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                await probe.until(lambda: probe.engine.stats().waiting == 0, "given back")
            await running.aclose()
            await probe.until_idle()

    async def test_death_ends_every_stream_and_a_new_engine_serves(self, engine_case: EngineCase) -> None:
        if engine_case.kill is None:
            pytest.skip("death cannot be provoked")
        prompt: tuple[int, ...]
        async with own_engine(engine_case) as probe:
            prompt = probe.prompt(20, "death")
            before = (await probe.run(prompt, max_tokens=10, **GREEDY)).token_ids
            probe.engine.check_health()
            streams = [probe.stream(probe.prompt(12, ("dying", i)), max_tokens=probe.long, **GREEDY) for i in range(4)]
            for stream in streams:
                await probe.first_delta(stream)
            await engine_case.kill(probe.engine)

            for stream in streams:
                async with asyncio.timeout(engine_case.deadline_s):
                    with pytest.raises(EngineDead):
                        async for _ in stream:
                            pass
            with pytest.raises(EngineDead):
                probe.engine.check_health()
            with pytest.raises(EngineDead):
                await probe.run(prompt, max_tokens=3, **GREEDY)
            assert is_idle(probe.engine.stats())
        async with own_engine(engine_case) as probe:
            assert (await probe.run(prompt, max_tokens=10, **GREEDY)).token_ids == before
            probe.engine.check_health()

    async def test_stop_ends_running_and_waiting_streams(self, engine_case: EngineCase) -> None:
        limits = EngineLimits(max_running=2) if engine_case.limits_queue else None
        async with own_engine(engine_case, limits) as probe:
            readers = [
                asyncio.ensure_future(probe.run(probe.prompt(12, ("stop", i)), max_tokens=probe.long, **GREEDY))
                for i in range(6)
            ]
            await probe.until(lambda: probe.engine.stats().running > 0, "running")
            async with asyncio.timeout(engine_case.deadline_s):
                await probe.engine.stop()
                results = await asyncio.gather(*readers, return_exceptions=True)
            assert all(isinstance(result, EngineDead) for result in results), results
            with pytest.raises(EngineDead):
                await probe.run(probe.prompt(12, "stopped"), max_tokens=3, **GREEDY)
            with pytest.raises(EngineDead):
                probe.engine.check_health()
            assert is_idle(probe.engine.stats())
            await probe.engine.stop()

    async def test_stop_before_start_and_twice(self, engine_case: EngineCase) -> None:
        engine = engine_case.make_engine()
        await engine.stop()
        await engine.stop()

    async def test_a_closed_stream_after_stop_is_harmless(self, engine_case: EngineCase) -> None:
        async with own_engine(engine_case) as probe:
            started = probe.stream(probe.prompt(12, "open"), max_tokens=probe.long, **GREEDY)
            untouched = probe.stream(probe.prompt(12, "untouched"), max_tokens=probe.long, **GREEDY)
            await probe.first_delta(started)
            await probe.engine.stop()
            await started.aclose()
            await untouched.aclose()

    async def test_what_an_engine_says_of_itself(self, probe: EngineProbe) -> None:
        info = probe.info
        assert info.engine.split()
        assert min(info.context_tokens, info.vocab_size, info.tokens_per_block, info.total_blocks) > 0
        assert probe.engine.stats().total_blocks == info.total_blocks
        probe.engine.check_health()
