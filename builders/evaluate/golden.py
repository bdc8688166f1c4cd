"""Golden samples: answers that the candidate gives again, so that a replica that gives others is known to be ill."""

from collections.abc import Sequence

from builders.evaluate.outputs import TextOutput
from builders.evaluate.requests import Asked, ask
from serve.artifacts.certificates import GoldenSample
from serve.core.request import SamplingParams
from serve.engines.protocol import Engine

_TOKENS = 16  # a replica's start should not take longer for them
_FEWEST = 4  # tokens; fewer say little
_TRIES = 4  # samples that are tried for each that is wanted


async def choose_golden(
    engine: Engine, texts: Sequence[TextOutput], stop_token_ids: Sequence[int], count: int
) -> tuple[GoldenSample, ...]:
    """Ask again, alone, what the engine continued in company, and keep the answers that are the same.

    What differs hangs on a near tie, which batches of another shape decide differently. Short prompts come first.

    Args:
        engine: Of the candidate.
        texts: What it made of the texts.
        stop_token_ids: Tokens that end an answer; not kept.
        count: Samples that are wanted; there may be fewer.
    """
    stops = frozenset(stop_token_ids)
    drafts = [(text.tokens[: text.prompt_tokens], _without_stop(text.continuation, stops)) for text in texts]
    drafts = sorted((draft for draft in drafts if len(draft[1]) >= _FEWEST), key=lambda draft: len(draft[0]))
    golden: list[GoldenSample] = []
    for prompt, tokens in drafts[: _TRIES * count]:
        if len(golden) == count:
            break
        told = await ask(engine, Asked(prompt, SamplingParams(temperature=0.0, max_tokens=len(tokens))))
        if told.tokens == tokens:
            golden.append(GoldenSample(prompt=prompt, tokens=tokens))
    return tuple(golden)


def _without_stop(continuation: Sequence[int], stops: frozenset[int]) -> tuple[int, ...]:
    ended = bool(continuation) and continuation[-1] in stops
    return tuple(continuation[:-1] if ended else continuation)[:_TOKENS]
