"""Conformance: streams are complete, in order, end where they should, and do not disturb each other."""

import asyncio
import itertools
import time
from typing import Any

import pytest

from serve.core.request import FinishReason
from serve.errors import ContextTooLong, RequestError
from tests.contract.engine_conformance_case import GREEDY, EngineProbe, Transcript, check_stats, is_idle


class StreamConformance:
    """`EngineProbe.run` checks every stream of every test; here is what needs a situation of its own."""

    @pytest.mark.parametrize("max_tokens", [1, 2, 17])
    async def test_generates_exactly_max_tokens(self, probe: EngineProbe, max_tokens: int) -> None:
        result = await probe.run(probe.prompt(20, max_tokens), max_tokens=max_tokens, **GREEDY)
        assert len(result.token_ids) == max_tokens
        assert result.finish_reason is FinishReason.LENGTH

    async def test_no_output_asked_for_is_one_delta_without_tokens(self, probe: EngineProbe) -> None:
        result = await probe.run(probe.prompt(20, "none"), max_tokens=0, **GREEDY)
        assert (result.token_ids, result.finish_reason) == ((), FinishReason.LENGTH)
        await probe.until_idle()

    async def test_a_prompt_of_one_token_and_a_prompt_of_whole_blocks(self, probe: EngineProbe) -> None:
        for tokens in (1, probe.info.tokens_per_block, probe.info.tokens_per_block * 2):
            result = await probe.run(probe.prompt(tokens, ("edge", tokens)), max_tokens=3, **GREEDY)
            assert len(result.token_ids) == 3

    async def test_a_request_id_in_flight_is_refused_and_may_come_again(self, probe: EngineProbe) -> None:
        request = probe.request(probe.prompt(13, "same id"), max_tokens=probe.long, **GREEDY)
        stream = probe.engine.generate(request)
        first = await probe.first_delta(stream)
        assert first.prefill is not None
        with pytest.raises(RequestError, match="request_id"):
            await probe.first_delta(probe.engine.generate(request))
        await stream.aclose()
        again = probe.engine.generate(request)  # at once: the engine may not have heard of the end of the first
        assert (await probe.first_delta(again)).prefill is not None
        await again.aclose()
        await probe.until_idle()

    async def test_tokens_are_below_the_vocabulary_size(self, probe: EngineProbe) -> None:
        result = await probe.run(probe.prompt(11, "vocab"), max_tokens=32, temperature=2.0, seed=1)
        assert all(0 <= token < probe.info.vocab_size for token in result.token_ids)

    async def test_tokens_arrive_while_others_are_still_to_come(self, probe: EngineProbe) -> None:
        # A stream, not one answer at the end: the engine's own count is not finished when the first delta is here.
        before = probe.engine.stats().generated_tokens
        request = probe.request(probe.prompt(9, "stream"), max_tokens=200, **GREEDY)
        stream = probe.engine.generate(request)
        first = await probe.first_delta(stream)
        assert len(first.token_ids) < 200
        assert probe.engine.stats().generated_tokens - before < 200
        await probe.finish(stream, request, first)

    async def test_greedy_output_is_the_same_alone_and_in_a_crowd(self, probe: EngineProbe) -> None:
        prompts = [probe.prompt(7 + 13 * i, ("crowd", i)) for i in range(8)]
        alone = [(await probe.run(prompt, max_tokens=20, **GREEDY)).token_ids for prompt in prompts]
        # Other neighbours, other lengths, and another position in the batch.
        crowd = await asyncio.gather(
            *(probe.run(prompt, max_tokens=20, **GREEDY) for prompt in reversed(prompts)),
            *(probe.run(probe.prompt(30, ("neighbour", i)), max_tokens=5 + 9 * i, seed=i) for i in range(4)),
        )
        assert [result.token_ids for result in crowd[:8]] == alone[::-1]

    async def test_same_prompt_many_times_at_once(self, probe: EngineProbe) -> None:
        prompt = probe.prompt(3 * probe.info.tokens_per_block + 5, "n")
        greedy = await asyncio.gather(*(probe.run(prompt, max_tokens=12, **GREEDY) for _ in range(6)))
        assert len({result.token_ids for result in greedy}) == 1
        drawn = await asyncio.gather(
            *(probe.run(prompt, max_tokens=24, temperature=2.0, seed=seed) for seed in range(6))
        )
        assert len({result.token_ids for result in drawn}) > 1

    async def test_a_stream_continues_from_what_was_generated(self, probe: EngineProbe) -> None:
        # What failover does: prompt and generated tokens become the prompt of the rest, on another engine.
        prompt = probe.prompt(25, "resume")
        whole = (await probe.run(prompt, max_tokens=24, **GREEDY)).token_ids
        for done in (1, 10, 23):
            rest = await probe.run(prompt + whole[:done], max_tokens=24 - done, **GREEDY)
            assert whole[:done] + rest.token_ids == whole

    async def test_context_is_used_to_its_end_and_not_beyond(self, probe: EngineProbe) -> None:
        context = probe.info.context_tokens
        result = await probe.run(probe.prompt(context - 4, "end"), max_tokens=4, **GREEDY)
        assert len(result.token_ids) == 4
        for prompt_tokens, max_tokens in ((context - 4, 5), (context + 1, 1), (context, 1)):
            with pytest.raises(ContextTooLong) as raised:
                await probe.run(probe.prompt(prompt_tokens, "beyond"), max_tokens=max_tokens, **GREEDY)
            assert str(context) in str(raised.value)
            assert str(prompt_tokens) in str(raised.value)
        await probe.until_idle()

    async def test_bad_requests_are_refused_and_change_nothing(self, probe: EngineProbe) -> None:
        good, vocab = probe.prompt(12, "bad"), probe.info.vocab_size
        bad: list[tuple[tuple[int, ...], dict[str, Any]]] = [
            ((), {}),
            ((*good, vocab), {}),
            (good, {"logprobs": probe.info.max_logprobs + 1}),
            (good, {"prompt_logprobs": probe.info.max_logprobs + 1}),
            (good, {"logit_bias": {vocab: 1.0}}),
        ]
        before = (await probe.run(good, max_tokens=8, **GREEDY)).token_ids
        await probe.until_idle()
        for prompt, sampling in bad:
            with pytest.raises(RequestError):
                await probe.run(prompt, max_tokens=4, **sampling)
            assert is_idle(probe.engine.stats())
        assert (await probe.run(good, max_tokens=8, **GREEDY)).token_ids == before

    async def test_stats_are_sane_at_every_delta_and_return_to_zero(self, probe: EngineProbe) -> None:
        before = await probe.until_idle()
        seen = [before]

        async def watch(i: int) -> Transcript:
            request = probe.request(probe.prompt(10 + 40 * i, ("stats", i)), max_tokens=10 + i, **GREEDY)
            stream, deltas = probe.engine.generate(request), []
            async for delta in stream:
                deltas.append(delta)
                seen.append(probe.engine.stats())
                check_stats(seen[-1])
            return await probe.finish(stream, request, *deltas)

        results = await asyncio.gather(*(watch(i) for i in range(10)))
        after = await probe.until_idle()
        check_stats(after)
        assert after.prompt_tokens - before.prompt_tokens == sum(10 + 40 * i for i in range(10))
        assert after.generated_tokens - before.generated_tokens == sum(len(result.token_ids) for result in results)
        assert after.cached_prompt_tokens - before.cached_prompt_tokens == sum(
            result.prefill.cached_tokens for result in results
        )
        for one, other in itertools.pairwise((*seen, after)):
            assert one.steps <= other.steps
            assert one.busy_s <= other.busy_s
            assert one.computed_prompt_tokens <= other.computed_prompt_tokens
            assert one.computed_prompt_pairs <= other.computed_prompt_pairs
        # Of the steps an engine may tell late.
        await probe.until(lambda: probe.engine.stats().steps > before.steps, "counting its steps")
        computed = sum(10 + 40 * i - result.prefill.cached_tokens for i, result in enumerate(results))
        await probe.until(
            lambda: probe.engine.stats().computed_prompt_tokens - before.computed_prompt_tokens == computed,
            f"counting the {computed} prompt tokens that it computed",
        )
        counted = probe.engine.stats()
        assert counted.busy_s > before.busy_s or counted.step_s == 0.0  # a simulated one may take no time

    async def test_emission_times_are_of_this_hosts_monotonic_clock(self, probe: EngineProbe) -> None:
        start = time.monotonic()
        async for delta in probe.stream(probe.prompt(10, "clock"), max_tokens=5, **GREEDY):
            if delta.token_ids and delta.emitted_s:
                assert start <= delta.emitted_s <= time.monotonic()

    async def test_the_event_loop_stays_free(self, probe: EngineProbe) -> None:
        longest = 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - before)

        ticker = asyncio.ensure_future(tick())
        try:
            long = probe.prompt(probe.info.context_tokens - 8, "loop")
            await asyncio.gather(
                probe.run(long, max_tokens=8, **GREEDY),
                *(probe.run(probe.prompt(15, ("loop", i)), max_tokens=30, **GREEDY) for i in range(8)),
            )
        finally:
            ticker.cancel()
        assert longest < probe.case.max_stall_s
