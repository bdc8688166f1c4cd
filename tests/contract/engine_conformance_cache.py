"""Conformance: prefixes are reused, salts separate, blocks are freed, and KV events tell exactly what is cached."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from msgspec.structs import replace

from serve.core.blocks import chain_seed
from serve.errors import RequestError
from tests.contract.engine_conformance_case import (
    GREEDY,
    EngineCase,
    EngineLimits,
    EngineProbe,
    KvMirror,
    Transcript,
    check_stats,
)


@asynccontextmanager
async def own_engine(case: EngineCase, limits: EngineLimits | None = None) -> AsyncIterator[EngineProbe]:
    """Start an engine for one test."""
    engine = case.make_engine(limits) if limits else case.make_engine()
    await engine.start()
    try:
        yield EngineProbe(engine, case)
    finally:
        await engine.stop()


async def settled(probe: EngineProbe, mirror: KvMirror) -> KvMirror:
    """Wait until the engine is idle and the mirror has heard of all it did."""
    await probe.until_idle()
    truth = probe.case.cache_content
    assert truth is not None, "EngineCase.cache_content is needed if shares_prefixes"
    await probe.until(lambda: mirror.content() == truth(probe.engine), "told by KV events")
    return mirror


def check_reuse(probe: EngineProbe, result: Transcript, prompt: Sequence[int], hit_blocks: int) -> None:
    """Check that a prompt reused what was cached: whole blocks, and never its last token."""
    size = probe.info.tokens_per_block
    whole = min(hit_blocks, (len(prompt) - 1) // size) * size
    cached = result.prefill.cached_tokens
    assert whole <= cached < min(whole + size, len(prompt)) if probe.case.partial_reuse else cached == whole


class CacheConformance:
    """Skipped as a whole, but for the memory tests, by an adapter that shares no prefixes."""

    async def test_a_second_request_reuses_the_prompt(self, probe: EngineProbe) -> None:
        size = probe.info.tokens_per_block
        for rest in (0, 1, size - 1):
            prompt = probe.prompt(4 * size + rest, ("reuse", rest))
            cold = await probe.run(prompt, max_tokens=16, **GREEDY)
            warm = await probe.run(prompt, max_tokens=16, **GREEDY)
            assert cold.prefill.cached_tokens == 0
            assert warm.token_ids == cold.token_ids
            check_reuse(probe, warm, prompt, 4 if probe.case.shares_prefixes else 0)
        drawn = [await probe.run(prompt, max_tokens=16, temperature=1.5, seed=5) for _ in range(2)]
        assert drawn[0].token_ids == drawn[1].token_ids

    async def test_prompts_with_a_common_prefix_share_it(self, probe: EngineProbe) -> None:
        if not probe.case.shares_prefixes:
            pytest.skip("shares no prefixes")
        size = probe.info.tokens_per_block
        common = probe.prompt(3 * size, "common")
        first, second = (common + probe.prompt(size + 3, ("own", i)) for i in range(2))
        alone = await probe.run(second, cache_salt="elsewhere", max_tokens=12, **GREEDY)
        await probe.run(first, max_tokens=4, **GREEDY)
        shared = await probe.run(second, max_tokens=12, **GREEDY)
        check_reuse(probe, shared, second, 3)
        assert shared.token_ids == alone.token_ids

    async def test_salts_separate(self, probe: EngineProbe) -> None:
        if not probe.case.shares_prefixes:
            pytest.skip("shares no prefixes")
        prompt = probe.prompt(3 * probe.info.tokens_per_block + 1, "salt")
        async with probe.mirror() as mirror:
            for salt in ("", "a", "b"):
                result = await probe.run(prompt, cache_salt=salt, max_tokens=2, **GREEDY)
                assert result.prefill.cached_tokens == 0
            again = await probe.run(prompt, cache_salt="a", max_tokens=2, **GREEDY)
            check_reuse(probe, again, prompt, 3)
            content = (await settled(probe, mirror)).content()
        assert all(set(probe.hashes(prompt, salt)) <= content for salt in ("", "a", "b"))

    async def test_an_adapter_has_blocks_of_its_own_or_is_refused(self, probe: EngineProbe) -> None:
        prompt = probe.prompt(3 * probe.info.tokens_per_block + 1, "adapter")
        await probe.run(prompt, max_tokens=2, **GREEDY)
        request = replace(probe.request(prompt, max_tokens=2, **GREEDY), lora="an adapter")
        refused_for = ""
        try:
            result = await probe.finish(probe.engine.generate(request), request)
            assert result.prefill.cached_tokens == 0
        except RequestError as exc:
            refused_for = exc.param or "nothing"
        assert refused_for in ("", "lora")

    async def test_events_tell_exactly_what_finished_requests_left(self, engine_case: EngineCase) -> None:
        if not engine_case.shares_prefixes:
            pytest.skip("shares no prefixes")
        async with own_engine(engine_case) as probe, probe.mirror() as mirror:
            assert mirror.content() == frozenset()
            size = probe.info.tokens_per_block
            required: set[int] = set()
            possible: dict[int, int] = {}
            for tokens, output in ((2 * size + 3, 1), (size, 2 * size + 2), (5 * size - 1, size)):
                prompt = probe.prompt(tokens, ("events", tokens))
                result = await probe.run(prompt, max_tokens=output, **GREEDY)
                required.update(probe.hashes(prompt))
                hashes = probe.hashes(prompt + result.token_ids)
                possible.update(zip(hashes, [chain_seed(), *hashes], strict=False))
            content = (await settled(probe, mirror)).parents
            assert required <= content.keys()
            assert content.items() <= possible.items()

    async def test_a_late_reader_gets_the_same_content(self, probe: EngineProbe) -> None:
        if not probe.case.shares_prefixes:
            pytest.skip("shares no prefixes")
        async with probe.mirror() as early:
            await probe.run(probe.prompt(3 * probe.info.tokens_per_block, "late"), max_tokens=2, **GREEDY)
            await settled(probe, early)
            async with probe.mirror() as late:
                assert late.parents == early.parents

    async def test_what_events_say_is_what_is_reused_under_eviction(self, engine_case: EngineCase) -> None:
        if not (engine_case.shares_prefixes and engine_case.limits_cache):
            pytest.skip("shares no prefixes, or cannot be given a small cache")
        rng = random.Random(4)
        async with own_engine(engine_case, EngineLimits(total_blocks=24)) as probe, probe.mirror() as mirror:
            size = probe.info.tokens_per_block
            fit = probe.info.total_blocks - 2
            prompts = [probe.prompt(rng.randint(size, 4 * size), ("evict", i)) for i in range(fit)]
            for _ in range(40):
                prompt = rng.choice(prompts)
                hit_blocks = (await settled(probe, mirror)).hit_blocks(probe.hashes(prompt))
                result = await probe.run(prompt, max_tokens=2, **GREEDY)
                check_reuse(probe, result, prompt, hit_blocks)
                check_stats(probe.engine.stats())
            assert len(mirror.parents) <= probe.info.total_blocks

    async def test_more_work_than_the_cache_holds_is_done_in_turn(self, engine_case: EngineCase) -> None:
        if not engine_case.limits_cache:
            pytest.skip("cannot be given a small cache")
        async with own_engine(engine_case, EngineLimits(total_blocks=16)) as probe:
            size, fit = probe.info.tokens_per_block, probe.info.total_blocks - 1
            prompts = [probe.prompt(size * (fit // 2) - 1 - i, ("work", i)) for i in range(6)]
            alone = [(await probe.run(prompt, max_tokens=size + 3, **GREEDY)).token_ids for prompt in prompts]
            crowd = await asyncio.gather(*(probe.run(prompt, max_tokens=size + 3, **GREEDY) for prompt in prompts))
            assert [result.token_ids for result in crowd] == alone
            await probe.until_idle()

    async def test_what_can_never_fit_is_refused_at_once(self, engine_case: EngineCase) -> None:
        if not engine_case.limits_cache:
            pytest.skip("cannot be given a small cache")
        async with own_engine(engine_case, EngineLimits(total_blocks=16)) as probe:
            capacity = probe.info.total_blocks * probe.info.tokens_per_block
            for prompt_tokens, max_tokens in ((capacity + 1, 1), (10, capacity)):
                with pytest.raises(RequestError):
                    await probe.run(probe.prompt(prompt_tokens, "never"), max_tokens=max_tokens, **GREEDY)
            await probe.run(probe.prompt(10, "never"), max_tokens=2, **GREEDY)

    async def test_closing_a_stream_frees_its_blocks(self, probe: EngineProbe) -> None:
        before = await probe.until_idle()
        prompt = probe.prompt(3 * probe.info.tokens_per_block, "close")
        whole = await probe.run(prompt, max_tokens=20, **GREEDY)
        stream = probe.stream(prompt, max_tokens=probe.info.context_tokens - len(prompt), **GREEDY)
        await probe.first_delta(stream)
        assert probe.engine.stats().used_blocks > 0
        await stream.aclose()
        after = await probe.until_idle()
        assert after.generated_tokens - before.generated_tokens < probe.info.context_tokens - len(prompt)
        assert (await probe.run(prompt, max_tokens=20, **GREEDY)).token_ids == whole.token_ids

    async def test_streams_closed_at_any_moment_leave_nothing(self, probe: EngineProbe) -> None:
        rng = random.Random(11)

        async def abandon(i: int) -> None:
            prompt = probe.prompt(rng.randint(1, 6 * probe.info.tokens_per_block), ("abandon", i))
            async with aclosing(probe.stream(prompt, max_tokens=60, **GREEDY)) as stream:
                for _ in range(i % 5):
                    await anext(stream)

        async def cancelled(i: int) -> None:
            reader = asyncio.ensure_future(probe.run(probe.prompt(40, ("cancel", i)), max_tokens=60, **GREEDY))
            for _ in range(i):
                await asyncio.sleep(0)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

        survivor = probe.prompt(30, "survivor")
        alone = await probe.run(survivor, max_tokens=40, **GREEDY)
        surviving = asyncio.ensure_future(probe.run(survivor, max_tokens=40, **GREEDY))
        await asyncio.gather(*(abandon(i) for i in range(12)), *(cancelled(i) for i in range(12)))
        assert (await surviving).token_ids == alone.token_ids
        await probe.until_idle()
        if not probe.case.shares_prefixes:
            return
        async with probe.mirror() as mirror:
            await settled(probe, mirror)
            assert len(mirror.parents) <= probe.engine.stats().cached_blocks
