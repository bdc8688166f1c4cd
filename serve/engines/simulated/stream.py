"""LiveSequence: one request of the live engine, with its tokens and whoever reads them."""

import asyncio

import numpy as np
import numpy.typing as npt

from serve.core.blocks import block_hashes, chain_seed
from serve.core.request import FinishReason, GenerateRequest, PrefillInfo, TokenDelta, TokenLogprob
from serve.engines.simulated.sampling import Sampler, describe
from serve.engines.simulated.sequence import ScheduledSequence


class LiveSequence(ScheduledSequence):
    """A sequence whose tokens are generated as the scheduler counts them, and wait here for one reader.

    The reader takes all that is there as one delta. What waits is bounded by the request's `max_tokens`.

    Args:
        request: Checked.
        prompt: Its token ids.
        sampler: Generates its tokens.
        tokens_per_block: > 0.
    """

    __slots__ = (
        "_emitted_s",
        "_error",
        "_is_first",
        "_logprob_count",
        "_logprobs",
        "_loop",
        "_may_stop",
        "_pending",
        "_size",
        "_stop_token_id",
        "_tail",
        "_waiter",
        "finish_reason",
        "request",
        "sampler",
    )

    def __init__(
        self, request: GenerateRequest, prompt: npt.NDArray[np.uint32], sampler: Sampler, tokens_per_block: int
    ) -> None:
        root = chain_seed(request.cache_salt, request.lora)
        hashes = block_hashes(prompt, tokens_per_block, root).tolist()
        super().__init__(
            request.request_id,
            len(prompt),
            hashes,
            root=root,
            max_tokens=request.sampling.max_tokens,
            next_hash=self._hash_next_block,
        )
        self.request = request
        self.sampler = sampler
        self.finish_reason: FinishReason | None = None
        self._logprob_count = request.sampling.logprobs
        self._size = tokens_per_block
        self._tail: list[int] = prompt[len(hashes) * tokens_per_block :].tolist()  # tokens after the last hashed block
        self._pending: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._stop_token_id: int | None = None
        self._emitted_s = 0.0
        self._error: Exception | None = None
        self._is_first = True
        self._may_stop = bool(request.sampling.stop_token_ids)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def emit(self, now_s: float) -> bool:
        """Generate the next token and wake the reader; return whether it was one, or the end."""
        sampler = self.sampler
        before = sampler.state
        token = sampler.next()
        if self._may_stop and sampler.is_stop(token):
            self._stop_token_id = token
            self.finish(FinishReason.STOP)
            return False
        self._tail.append(token)
        pending = self._pending
        if not pending:
            self._emitted_s = now_s
        pending.append(token)
        if self._logprob_count is not None:
            self._logprobs.append(describe(sampler.source, before, token, self._logprob_count))
        waiter = self._waiter
        if waiter is not None:
            self._wake(waiter)
        return True

    def finish(self, reason: FinishReason) -> None:
        """Say that there is no further token. The first reason counts."""
        if self.finish_reason is None:
            self.finish_reason = reason
        if self._waiter is not None:
            self._wake(self._waiter)

    def fail(self, error: Exception) -> None:
        """Make the reader raise, after it has taken what is there."""
        self._error = error
        if self._waiter is not None:
            self._wake(self._waiter)

    async def take(self) -> TokenDelta:
        """Wait for tokens, the end or an error, and return all that is there."""
        while not (self._pending or self.finish_reason or self._error):
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None and self.finish_reason is None:
            raise self._error
        delta = TokenDelta(
            tuple(self._pending),
            self.finish_reason,
            self._stop_token_id,
            tuple(self._logprobs) if self._logprob_count is not None else None,
            self._prefill_info() if self._is_first else None,
            self._emitted_s,
        )
        self._is_first = False
        self._pending.clear()
        self._logprobs.clear()
        return delta

    def _prefill_info(self) -> PrefillInfo:
        return PrefillInfo(
            cached_tokens=self.cached_tokens,
            queue_s=max(0.0, self.started_s - self.arrived_s),
            prefill_s=max(0.0, self.first_token_s - self.started_s),
        )

    def _wake(self, waiter: asyncio.Future[None]) -> None:
        self._waiter = None
        if not waiter.done():  # the reader may have been cancelled
            waiter.set_result(None)

    def _hash_next_block(self, block: int) -> int:
        parent = self.hashes[block - 1] if block else self.root
        tokens, self._tail = self._tail[: self._size], self._tail[self._size :]
        return int(block_hashes(np.asarray(tokens, dtype=np.uint32), self._size, parent)[0])
