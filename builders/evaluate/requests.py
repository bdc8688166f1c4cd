"""Many requests to one engine: so many at a time, in order, each with a limit of time."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from builders.evaluate.together import together
from serve.core.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprob, pack_tokens
from serve.engines.protocol import Engine
from serve.errors import Overloaded, RequestError

_MODEL = "candidate"  # engines do not look at it
_TRIES = 60
_ids = itertools.count()


@dataclass(frozen=True)
class Asked:
    """A prompt, and what is wanted of it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Told:
    """What an engine made of it.

    Attributes:
        tokens: Generated ones; a stop token is not among them.
        stop_token_id: The stop token that ended the sequence.
        prompt_logprobs: If they were asked for; None for the first token.
        error: The engine cannot do this; then there is nothing else.
    """

    tokens: tuple[int, ...] = ()
    stop_token_id: int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: RequestError | None = None

    @property
    def overflowed(self) -> bool:
        """Whether the model computed no numbers."""
        return self.error is not None and self.error.code == "model_overflow"


async def ask_all(
    engine: Engine, requests: Sequence[Asked], concurrency: int, tell: Callable[[int], None] | None = None
) -> list[Told]:
    """Run requests, and return what came of each, in their order.

    Args:
        engine: Started.
        requests: Any number.
        concurrency: How many are in flight.
        tell: Told after each request.

    Raises:
        EngineDead: The engine is gone; the other requests were given up.
    """
    results: list[Told] = [Told()] * len(requests)
    remaining = iter(enumerate(requests))

    async def work() -> None:
        for index, request in remaining:
            results[index] = await ask(engine, request)
            if tell is not None:
                tell(1)

    await together(work() for _ in range(min(concurrency, len(requests))))
    return results


async def ask(engine: Engine, asked: Asked) -> Told:
    """Run one request, again if the engine is full.

    Raises:
        Overloaded: It stays full: most likely it has not the memory for this request.
        EngineDead: The engine is gone.
    """
    for tries in itertools.count(1):
        try:
            return await _ask(engine, asked)
        except Overloaded as exc:
            if tries == _TRIES:
                raise
            await asyncio.sleep(exc.retry_after_s)
        except RequestError as exc:
            return Told(error=exc)
    raise AssertionError("counting never ends")


async def _ask(engine: Engine, asked: Asked) -> Told:
    request = GenerateRequest(f"evaluate-{next(_ids)}", _MODEL, pack_tokens(asked.prompt), asked.sampling)
    tokens: list[int] = []
    stop: int | None = None
    scores: tuple[TokenLogprob | None, ...] | None = None
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            tokens += delta.token_ids
            if delta.prefill is not None:
                scores = delta.prefill.prompt_logprobs
            if delta.finish_reason is FinishReason.STOP:
                stop = delta.stop_token_id
    return Told(tuple(tokens), stop, scores)
