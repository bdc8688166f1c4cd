"""Conformance: every sampling parameter takes effect or is refused by name; none is ignored."""

import asyncio
import math
from typing import Any

import pytest

from serve.core.request import FinishReason, TokenLogprob
from serve.errors import RequestError
from tests.contract.engine_conformance_case import GREEDY, EngineProbe


async def supports(probe: EngineProbe, **sampling: Any) -> bool:
    """Return whether the case says that a parameter is supported; if not, check that it is refused by name."""
    (name,) = sampling
    if name not in probe.case.refuses:
        return True
    with pytest.raises(RequestError) as raised:
        await probe.run(probe.prompt(10, name), max_tokens=2, **sampling)
    assert raised.value.param == name
    return False


class SamplingConformance:
    """Effects are provoked with extreme values, so that they show on any model."""

    async def test_a_seed_reproduces_whatever_else_is_in_the_batch(self, probe: EngineProbe) -> None:
        if not await supports(probe, seed=1):
            return
        prompt = probe.prompt(18, "seed")
        drawn: dict[str, Any] = {"max_tokens": 24, "temperature": 1.5, "top_p": 0.95}
        alone = await probe.run(prompt, seed=7, **drawn)
        other = await probe.run(prompt, seed=8, **drawn)
        crowd = await asyncio.gather(
            *(probe.run(probe.prompt(9 + i, ("seeded", i)), seed=i, **drawn) for i in range(3)),
            probe.run(prompt, seed=7, **drawn),
            *(probe.run(probe.prompt(40, ("seeded", i)), max_tokens=12, **GREEDY) for i in range(3)),
        )
        assert crowd[3].token_ids == alone.token_ids
        assert other.token_ids != alone.token_ids

    async def test_without_a_seed_draws_differ(self, probe: EngineProbe) -> None:
        prompt = probe.prompt(18, "unseeded")
        results = await asyncio.gather(*(probe.run(prompt, max_tokens=24, temperature=2.0) for _ in range(4)))
        assert len({result.token_ids for result in results}) > 1

    @pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}])
    async def test_the_narrowest_filter_is_greedy(self, probe: EngineProbe, narrow: dict[str, Any]) -> None:
        if not await supports(probe, **narrow):
            return
        prompt = probe.prompt(18, "narrow")
        greedy = await probe.run(prompt, max_tokens=12, **GREEDY)
        drawn = await probe.run(prompt, max_tokens=12, **{"temperature": 2.0, "seed": 3, **narrow})
        assert drawn.token_ids == greedy.token_ids

    async def test_logit_bias_forces_and_forbids_tokens(self, probe: EngineProbe) -> None:
        if not await supports(probe, logit_bias={5: 1.0}):
            return
        prompt, forced = probe.prompt(18, "bias"), probe.case.token_ids[17]
        result = await probe.run(prompt, max_tokens=6, logit_bias={forced: 100.0}, **GREEDY)
        assert set(result.token_ids) == {forced}
        natural = await probe.run(prompt, max_tokens=1, **GREEDY)
        (first,) = natural.token_ids
        other = await probe.run(prompt, max_tokens=1, logit_bias={first: -100.0}, **GREEDY)
        assert other.token_ids != natural.token_ids

    @pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
    async def test_output_penalties_make_a_token_less_likely_the_second_time(
        self, probe: EngineProbe, name: str
    ) -> None:
        if not await supports(probe, **{name: 0.5}):
            return
        prompt, ids = probe.prompt(18, "penalty"), probe.case.token_ids
        for a, b in zip(ids[10:30], ids[30:50], strict=True):
            # Lift two tokens above all others: `a` wins twice, but had `b` one more, it would win a place.
            at = await _highest_bias(probe, prompt, won=(a, a), rival=b)
            first, second = (
                await probe.run(prompt, max_tokens=2, logit_bias={a: 50.0, b: at + 1.0}, **GREEDY)
            ).token_ids
            if (first, second) == (a, b):  # the second place: there, and only there, a penalty on `a` must act
                bias = {a: 50.0, b: float(at)}
                result = await probe.run(prompt, max_tokens=2, logit_bias=bias, **{name: 2.0}, **GREEDY)
                assert result.token_ids == (a, b)
                return
        pytest.fail("no pair of tokens tells whether the penalty acts")

    async def test_repetition_penalty_acts_on_the_prompt(self, probe: EngineProbe) -> None:
        if not await supports(probe, repetition_penalty=1.1):
            return
        changed = False
        for i in range(4):
            prompt = probe.prompt(18, ("repetition", i))
            (natural,) = (await probe.run(prompt, max_tokens=1, **GREEDY)).token_ids
            # Lift a token of the prompt until it just wins; a penalty then takes the place from it.
            token = next(token for token in prompt if token != natural)
            bias = {token: float(await _lowest_winning_bias(probe, prompt, token))}
            result = await probe.run(prompt, max_tokens=1, logit_bias=bias, repetition_penalty=100.0, **GREEDY)
            changed = changed or result.token_ids != (token,)
        assert changed

    async def test_a_stop_token_ends_the_sequence_and_is_not_output(self, probe: EngineProbe) -> None:
        prompt = probe.prompt(18, "stop")
        free = (await probe.run(prompt, max_tokens=24, **GREEDY)).token_ids
        for at in sorted({free.index(token) for token in free})[:3]:  # first, and two later places
            result = await probe.run(prompt, max_tokens=24, stop_token_ids=(free[at],), **GREEDY)
            assert result.finish_reason is FinishReason.STOP
            assert result.stop_token_id == free[at]
            assert result.token_ids == free[:at]
        await probe.until_idle()

    async def test_min_tokens_holds_stop_tokens_back(self, probe: EngineProbe) -> None:
        if not await supports(probe, min_tokens=1):
            return
        prompt = probe.prompt(18, "min")
        free = (await probe.run(prompt, max_tokens=24, **GREEDY)).token_ids
        result = await probe.run(prompt, max_tokens=24, min_tokens=6, stop_token_ids=(free[0],), **GREEDY)
        assert len(result.token_ids) >= 6

    @pytest.mark.parametrize("count", [0, 1, 5])
    async def test_logprobs_describe_each_token(self, probe: EngineProbe, count: int) -> None:
        if not await supports(probe, logprobs=count):
            return
        prompt = probe.prompt(18, "logprobs")
        greedy = await probe.run(prompt, max_tokens=10, logprobs=count, **GREEDY)
        drawn = await probe.run(prompt, max_tokens=10, logprobs=count, temperature=1.5, seed=2)
        assert greedy.token_ids == (await probe.run(prompt, max_tokens=10, **GREEDY)).token_ids
        for result in (greedy, drawn):
            assert result.logprobs is not None
            assert len(result.logprobs) == 10
            for entry in result.logprobs:
                _check_logprob(entry, count)
        if count:
            assert all(entry.top[0][0] == entry.token_id for entry in greedy.logprobs or ())

    async def test_prompt_logprobs_describe_the_whole_prompt(self, probe: EngineProbe) -> None:
        if not await supports(probe, prompt_logprobs=2):
            return
        prompt = probe.prompt(2 * probe.info.tokens_per_block + 9, "prompt logprobs")
        await probe.run(prompt, max_tokens=1, **GREEDY)  # so that its prefix is cached
        for max_tokens in (0, 3):
            result = await probe.run(prompt, max_tokens=max_tokens, prompt_logprobs=2, **GREEDY)
            entries = result.prefill.prompt_logprobs
            assert entries is not None
            assert len(entries) == len(prompt)
            assert entries[0] is None
            described = [entry for entry in entries if entry is not None]
            assert [entry.token_id for entry in described] == list(prompt[1:])
            for entry in described:
                _check_logprob(entry, 2)


async def _highest_bias(probe: EngineProbe, prompt: tuple[int, ...], *, won: tuple[int, int], rival: int) -> int:
    """Return the highest integer bias of `rival` with which `won`, whose bias is 50, still is the output."""
    low, high = -50, 100
    while high - low > 1:
        middle = (low + high) // 2
        bias = {won[0]: 50.0, rival: float(middle)}
        result = await probe.run(prompt, max_tokens=2, logit_bias=bias, **GREEDY)
        low, high = (middle, high) if result.token_ids == won else (low, middle)
    return low


async def _lowest_winning_bias(probe: EngineProbe, prompt: tuple[int, ...], token: int) -> int:
    """Return the lowest integer bias with which `token` is the first output."""
    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        result = await probe.run(prompt, max_tokens=1, logit_bias={token: float(middle)}, **GREEDY)
        low, high = (low, middle) if result.token_ids == (token,) else (middle, high)
    return high


def _check_logprob(entry: TokenLogprob, count: int) -> None:
    values = [value for _, value in entry.top]
    assert len(values) == count
    assert values == sorted(values, reverse=True)
    assert all(value <= 1e-6 and not math.isnan(value) for value in (*values, entry.logprob))
    assert len({token for token, _ in entry.top}) == count
    if entry.token_id in dict(entry.top):
        assert dict(entry.top)[entry.token_id] == pytest.approx(entry.logprob, abs=1e-4)
    elif values:
        assert entry.logprob <= values[-1] + 1e-4
