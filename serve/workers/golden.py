"""Golden samples: an engine that loads, and then babbles, is not put to work.

A bundle's certificate holds greedy answers that its engine gave when it was verified. A replica repeats some of them.
Kernels round differently in batches of another shape, so that a near tie may be decided differently, and from there on
everything is: each wrong token is therefore counted once, and the sample is continued from the token that was expected.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from pydantic import ValidationError

from serve.artifacts.certificates import GoldenSample
from serve.artifacts.manifest import GOLDEN
from serve.core.request import GenerateRequest, SamplingParams, TokenDelta, pack_tokens
from serve.errors import BundleCorrupt, BundleMismatch

Generate = Callable[[GenerateRequest], AsyncGenerator[TokenDelta, None]]


class GoldenMismatch(BundleMismatch):
    """A bundle's engine does not answer as it did when the bundle was verified."""


def read_golden(bundle: Path) -> tuple[GoldenSample, ...]:
    """Return the golden samples of a bundle; none: it has none.

    Raises:
        BundleCorrupt: They cannot be read.
    """
    path = bundle / GOLDEN
    try:
        lines = path.read_text().splitlines()
        return tuple(GoldenSample.model_validate_json(line) for line in lines if line.strip())
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, ValidationError) as exc:
        raise BundleCorrupt(f"{GOLDEN} of the bundle cannot be read: {exc}") from exc


async def repeat_golden(
    model_id: str, generate: Generate, samples: Sequence[GoldenSample], min_agreement: float, timeout_s: float
) -> float:
    """Repeat golden samples, one after the other; returns the share of tokens that were the same.

    Args:
        model_id: As requests name the model.
        generate: Of the started engine.
        samples: Which.
        min_agreement: The share that is needed.
        timeout_s: How long it may take.

    Raises:
        GoldenMismatch: Fewer are the same, or it takes too long.
        EngineDead: As the engine.
    """
    told = [sample for sample in samples if sample.tokens]
    total = sum(len(sample.tokens) for sample in told)
    if not total:
        return 1.0
    budget = int((1 - min_agreement) * total + 1e-9)  # wrong tokens that are still good
    try:
        async with asyncio.timeout(timeout_s):
            missed = await _repeat_all(model_id, generate, told, budget)
    except TimeoutError:
        raise GoldenMismatch(
            f"the golden samples of the bundle were not repeated within bundle_check.golden_timeout_s={timeout_s:g} s"
        ) from None
    share = 1 - missed / total
    if missed > budget:
        raise GoldenMismatch(
            f"of the golden samples, {'at most ' if missed < total else ''}{share:.0%} of {total} tokens are what the "
            f"bundle generated when it was verified, and bundle_check.min_golden_agreement={min_agreement:g} are "
            "needed: the engine does not compute on this node what it computed there"
        )
    return share


async def _repeat_all(model_id: str, generate: Generate, samples: Sequence[GoldenSample], budget: int) -> int:
    """Return how many tokens are wrong; no more than one beyond the budget is looked for."""
    missed = 0
    for number, sample in enumerate(samples):
        done = 0
        while done < len(sample.tokens) and missed <= budget:
            expected = sample.tokens[done:]
            request = GenerateRequest(
                request_id=f"golden-{number}-{done}",
                model=model_id,
                prompt=pack_tokens((*sample.prompt, *sample.tokens[:done])),
                sampling=SamplingParams(temperature=0.0, max_tokens=len(expected)),
            )
            same = await _leading_agreement(generate, request, expected)
            missed += same < len(expected)
            done += same + 1  # the wrong one is taken for right, once it is counted
    return missed


async def _leading_agreement(generate: Generate, request: GenerateRequest, expected: Sequence[int]) -> int:
    """Return how many tokens are as expected before the first that is not; what comes behind that is not generated."""
    same = 0
    async with aclosing(generate(request)) as deltas:
        async for delta in deltas:
            for token in delta.token_ids:
                if same == len(expected) or token != expected[same]:
                    return same
                same += 1
    return same
