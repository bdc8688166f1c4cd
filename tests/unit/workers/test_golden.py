"""How the golden samples tell an engine that babbles from one that rounds differently."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.artifacts.certificates import GoldenSample
from serve.core.request import FinishReason, GenerateRequest, TokenDelta
from serve.errors import BundleCorrupt, EngineDead
from serve.workers.golden import GoldenMismatch, read_golden, repeat_golden

LENGTH = 50
PROMPT = (7, 8, 9)
SAMPLES = [GoldenSample(prompt=(n, *PROMPT), tokens=tuple(range(n, n + LENGTH))) for n in (100, 300)]


class Teller:
    """Generates what it knows, but for some positions, behind which it knows nothing any more.

    Args:
        wrong: Positions, of every sample.
        per_delta: Tokens that come together.
    """

    def __init__(self, wrong: Sequence[int] = (), per_delta: int = 1) -> None:
        self.asked = 0
        self._wrong = set(wrong)
        self._per_delta = per_delta

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self.asked += 1
        first, *rest = request.prompt_array().tolist()
        begin = len(rest) - len(PROMPT)
        good, tokens = True, []
        for position in range(begin, begin + request.sampling.max_tokens):
            good = good and position not in self._wrong
            tokens.append(first + position if good else 1)
        for at in range(0, len(tokens), self._per_delta):
            last = at + self._per_delta >= len(tokens)
            yield TokenDelta(tuple(tokens[at : at + self._per_delta]), FinishReason.LENGTH if last else None)


@pytest.mark.parametrize("per_delta", [1, 7, LENGTH])
async def test_the_same_tokens_agree_wholly(per_delta: int) -> None:
    teller = Teller(per_delta=per_delta)
    assert await repeat_golden("m", teller.generate, SAMPLES, 1.0, 10) == 1.0
    assert teller.asked == len(SAMPLES)


@given(st.sets(st.integers(0, LENGTH - 1), max_size=5))
async def test_each_wrong_token_counts_once_however_early_it_is(wrong: set[int]) -> None:
    share = await repeat_golden("m", Teller(sorted(wrong)).generate, SAMPLES, 0.9, 10)
    assert share == pytest.approx(1 - len(wrong) / LENGTH)


@given(st.sets(st.integers(0, LENGTH - 1), min_size=6))
async def test_more_than_a_tenth_is_too_much(wrong: set[int]) -> None:
    with pytest.raises(GoldenMismatch, match=r"of 100 tokens.*min_golden_agreement=0.9"):
        await repeat_golden("m", Teller(sorted(wrong)).generate, SAMPLES, 0.9, 10)


async def test_babble_is_not_listened_to_for_long() -> None:
    teller = Teller(range(LENGTH))
    with pytest.raises(GoldenMismatch, match="at most"):
        await repeat_golden("m", teller.generate, SAMPLES, 0.9, 10)
    assert teller.asked == 11


async def test_an_engine_that_stops_early_has_not_agreed() -> None:
    async def silent(_request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((), FinishReason.STOP)

    with pytest.raises(GoldenMismatch):
        await repeat_golden("m", silent, SAMPLES, 0.9, 10)


async def test_one_that_dies_or_hangs_has_failed() -> None:
    async def hang(_request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        await asyncio.Event().wait()
        yield TokenDelta()

    async def dies(_request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((100,))
        raise EngineDead("gone")

    with pytest.raises(EngineDead):
        await repeat_golden("m", dies, SAMPLES, 0.9, 10)
    with pytest.raises(GoldenMismatch, match=r"golden_timeout_s=0\.01"):
        await repeat_golden("m", hang, SAMPLES, 0.9, 0.01)


async def test_no_samples_are_no_obstacle() -> None:
    empty = GoldenSample(prompt=PROMPT, tokens=())
    assert await repeat_golden("m", Teller().generate, [], 0.9, 10) == 1.0
    assert await repeat_golden("m", Teller().generate, [empty], 0.9, 10) == 1.0


def test_samples_are_read_from_the_certificate(tmp_path: Path) -> None:
    assert read_golden(tmp_path) == ()
    (tmp_path / "certificates").mkdir()
    file = tmp_path / "certificates/golden.jsonl"
    file.write_text("".join(sample.model_dump_json() + "\n" for sample in SAMPLES))
    assert read_golden(tmp_path) == tuple(SAMPLES)
    file.write_text('{"prompt": []}')
    with pytest.raises(BundleCorrupt, match=r"golden\.jsonl"):
        read_golden(tmp_path)
