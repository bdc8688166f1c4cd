"""BigramEngine: an engine whose next token depends on the last one only, so that every figure is known beforehand."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from serve.core.kv_events import KvEventBatch
from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta, TokenLogprob
from serve.engines.protocol import EngineInfo, EngineStats
from serve.errors import EngineDead, Overloaded, RequestError


class BigramEngine:
    """Engine port.

    Args:
        logits: (vocabulary, vocabulary); row i are the logits of what follows token i.
        scores_prompts: Whether it can tell the log probabilities of a prompt.
        dies_after: Requests after which it is dead; None: never.
        full_first: How many requests are refused first, for lack of room.
    """

    def __init__(
        self,
        logits: npt.NDArray[np.float64],
        *,
        scores_prompts: bool = True,
        dies_after: int | None = None,
        full_first: int = 0,
        context_tokens: int = 256,
    ) -> None:
        self._logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        self._scores_prompts, self._dies_after, self._full = scores_prompts, dies_after, full_first
        self.requests = 0
        self.most_at_once = 0
        self._running = 0
        self._info = EngineInfo("bigram 1", context_tokens, len(logits), 16, 1000, "cpu", max_logprobs=20)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        pass

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self._check(request)
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            await asyncio.sleep(0)
            prompt, sampling = request.prompt_array().tolist(), request.sampling
            scores = None if sampling.prompt_logprobs is None else self._scores(prompt, sampling.prompt_logprobs)
            prefill: PrefillInfo | None = PrefillInfo(prompt_logprobs=scores)
            last = prompt[-1]
            for _ in range(sampling.max_tokens):
                last = int(self._logprobs[last].argmax())
                if last in sampling.stop_token_ids:
                    yield TokenDelta((), FinishReason.STOP, last, prefill=prefill)
                    return
                yield TokenDelta((last,), prefill=prefill)
                prefill = None
            yield TokenDelta((), FinishReason.LENGTH, prefill=prefill)
        finally:
            self._running -= 1

    def _check(self, request: GenerateRequest) -> None:
        self.requests += 1
        if self._dies_after is not None and self.requests > self._dies_after:
            raise EngineDead("it died")
        if self._full:
            self._full -= 1
            raise Overloaded("full", retry_after_s=0.0)
        if request.prompt_tokens + request.sampling.max_tokens > self._info.context_tokens:
            raise RequestError("too long.", "prompt")
        if request.sampling.prompt_logprobs is not None and not self._scores_prompts:
            raise RequestError("prompt_logprobs: no logits are kept", "prompt_logprobs", "unsupported_parameter")

    def _scores(self, prompt: list[int], count: int) -> tuple[TokenLogprob | None, ...]:
        entries: list[TokenLogprob | None] = [None]
        for last, token in pairwise(prompt):
            row = self._logprobs[last]
            top = tuple((int(i), float(row[i])) for i in np.argsort(-row, kind="stable")[:count])
            entries.append(TokenLogprob(token, float(row[token]), top))
        return tuple(entries)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        return
        yield

    def check_health(self) -> None:
        pass

    async def stop(self) -> None:
        pass
