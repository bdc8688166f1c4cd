"""What the conformance suite knows about an adapter, and how it talks to an engine and listens to it."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.core.blocks import block_hashes, chain_seed
from serve.core.kv_events import KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.request import (
    FinishReason,
    GenerateRequest,
    PrefillInfo,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    pack_tokens,
)
from serve.engines.protocol import Engine, EngineStats

GREEDY: dict[str, Any] = {"temperature": 0.0}


@dataclass(frozen=True)
class EngineLimits:
    """What a test asks `EngineCase.make_engine` to restrict. None: the adapter's own choice.

    Attributes:
        total_blocks: KV blocks, about; `info.total_blocks` says what it became.
        max_running: Sequences in the batch at once.
        max_waiting: Sequences that may wait before others are refused with `Overloaded`.
    """

    total_blocks: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None

    @property
    def queue(self) -> dict[str, Any]:
        """What is asked of batch and queue, by the names that all engines' settings have."""
        asked = {"max_batch_size": self.max_running, "max_waiting": self.max_waiting}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def blocks(self) -> dict[str, Any]:
        """What is asked of the cache, by the name that the simulated engine's settings have."""
        return {} if self.total_blocks is None else {"total_blocks": self.total_blocks}


@dataclass(frozen=True)
class EngineCase:
    """One adapter in one configuration.

    Attributes:
        make_engine: Makes an engine that is not started. Called with `EngineLimits`, or nothing.
        token_ids: Ordinary token ids, at least 50, of which prompts are made.
        refuses: `SamplingParams` fields that the adapter answers with `RequestError`; all others must take effect.
        shares_prefixes: Whether KV blocks are reused. If not, `cached_tokens` is always 0 and there are no KV events.
        partial_reuse: Whether a block can be reused in part, so that `cached_tokens` exceeds the whole blocks hit.
        limits_cache: Whether `EngineLimits.total_blocks` is obeyed.
        limits_queue: Whether `max_running` and `max_waiting` are.
        kill: Makes a started engine die as if a rank was lost; None: it cannot be provoked here.
        cache_content: The adapter's own view of what can be reused, as our block hashes. Needed if `shares_prefixes`:
            it says when the events of a step have all arrived, and what they have to add up to.
        deadline_s: When a test stops waiting for something that should have happened.
        max_stall_s: Longest time that the event loop may be held, on a busy machine.
    """

    make_engine: Callable[..., Engine]
    token_ids: Sequence[int]
    refuses: frozenset[str] = frozenset()
    shares_prefixes: bool = True
    partial_reuse: bool = False
    limits_cache: bool = True
    limits_queue: bool = True
    kill: Callable[[Engine], Awaitable[None]] | None = None
    cache_content: Callable[[Engine], frozenset[int]] | None = None
    deadline_s: float = 60.0
    max_stall_s: float = 1.0


@dataclass(frozen=True)
class Transcript:
    """A whole stream, checked against the contract of `TokenDelta` and put together."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None
    logprobs: tuple[TokenLogprob, ...] | None
    prefill: PrefillInfo


@dataclass
class KvMirror:
    """A consumer's copy of a KV cache, built from events alone."""

    parents: dict[int, int] = field(default_factory=dict)
    sequence: int | None = None

    def apply(self, batch: KvEventBatch) -> None:
        """Apply one batch, and check that nothing is missing between it and the one before."""
        assert batch.events, "an empty batch"
        for event in batch.events:
            if isinstance(event, KvSnapshot):
                assert len(event.block_hashes) == len(event.parents)
                self.parents = dict(zip(event.block_hashes, event.parents, strict=True))
            elif isinstance(event, KvStored):
                for parent, block_hash in zip((event.parent, *event.block_hashes), event.block_hashes, strict=False):
                    self.parents[block_hash] = parent
            elif isinstance(event, KvRemoved):
                for block_hash in event.block_hashes:
                    assert self.parents.pop(block_hash, None) is not None, "removed a block that was not there"
        if self.sequence is None:
            assert isinstance(batch.events[0], KvSnapshot), "the first batch is no snapshot"
        elif not isinstance(batch.events[0], KvSnapshot):
            assert batch.sequence == self.sequence + 1, "a batch is missing"
        self.sequence = batch.sequence

    def content(self) -> frozenset[int]:
        return frozenset(self.parents)

    def hit_blocks(self, hashes: Sequence[int]) -> int:
        """Return how many leading blocks of a chain are held."""
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self.parents), len(hashes))


class EngineProbe:
    """A started engine, and short ways to ask it for something."""

    def __init__(self, engine: Engine, case: EngineCase) -> None:
        self.engine = engine
        self.case = case
        self.info = engine.info
        self._count = 0

    def prompt(self, tokens: int, tag: object) -> tuple[int, ...]:
        """Return a prompt of so many tokens that depends on `tag` only."""
        return tuple(random.Random(repr(tag)).choices(self.case.token_ids, k=tokens))

    @property
    def long(self) -> int:
        """Output tokens that take a while, but whose KV blocks several sequences can have at once."""
        return min(1000, self.info.context_tokens // 2)

    def request(self, prompt: Sequence[int], cache_salt: str = "", **sampling: Any) -> GenerateRequest:
        self._count += 1
        return GenerateRequest(
            request_id=f"{id(self):x}-{self._count}",
            model="conformance",
            prompt=pack_tokens(prompt),
            sampling=SamplingParams(**sampling),
            cache_salt=cache_salt,
        )

    def stream(self, prompt: Sequence[int], **sampling: Any) -> AsyncGenerator[TokenDelta, None]:
        return self.engine.generate(self.request(prompt, **sampling))

    async def run(self, prompt: Sequence[int], **sampling: Any) -> Transcript:
        """Generate to the end and check the stream."""
        request = self.request(prompt, **sampling)
        return await self.finish(self.engine.generate(request), request)

    async def finish(
        self, stream: AsyncGenerator[TokenDelta, None], request: GenerateRequest, *taken: TokenDelta
    ) -> Transcript:
        """Read the rest of a stream, of which the deltas `taken` were read before, and check all of it."""
        deltas = list(taken)
        async with asyncio.timeout(self.case.deadline_s), aclosing(stream):
            deltas.extend([delta async for delta in stream])
        return check_stream(deltas, request)

    async def first_delta(self, stream: AsyncGenerator[TokenDelta, None]) -> TokenDelta:
        async with asyncio.timeout(self.case.deadline_s):
            return await anext(stream)

    def hashes(self, tokens: Sequence[int], cache_salt: str = "") -> list[int]:
        """Return the block hashes of a sequence as Python ints."""
        array = np.asarray(tokens, dtype=np.uint32)
        return [int(h) for h in block_hashes(array, self.info.tokens_per_block, chain_seed(cache_salt))]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition that nobody announces."""
        try:
            async with asyncio.timeout(self.case.deadline_s):
                for _ in range(50):  # an engine may be fast
                    if condition():
                        return
                    await asyncio.sleep(0)
                while not condition():  # noqa: ASYNC110  # an engine announces nothing
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(f"not {what} after {self.case.deadline_s} s: {self.engine.stats()}") from None

    async def until_idle(self) -> EngineStats:
        """Wait until nothing is held for any request."""
        await self.until(lambda: is_idle(self.engine.stats()), "idle")
        return self.engine.stats()

    @asynccontextmanager
    async def mirror(self) -> AsyncIterator[KvMirror]:
        """Follow the engine's KV events for as long as the context is open."""
        mirror, seeded = KvMirror(), asyncio.Event()

        async def follow() -> None:
            async with aclosing(self.engine.kv_events()) as batches:
                async for batch in batches:
                    mirror.apply(batch)
                    seeded.set()

        reader = asyncio.ensure_future(follow())
        try:
            first = asyncio.ensure_future(seeded.wait())
            await asyncio.wait({reader, first}, timeout=self.case.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            assert seeded.is_set(), "no snapshot"
            yield mirror
        finally:
            failed = reader.done() and not reader.cancelled() and reader.exception()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            if failed:
                raise failed


def is_idle(stats: EngineStats) -> bool:
    """Return whether nothing is held for any request."""
    return stats.running == stats.waiting == stats.used_blocks == stats.queued_prefill_tokens == 0


def check_stats(stats: EngineStats) -> None:
    """Check what must be true of an engine's load at any moment."""
    assert min(stats.running, stats.waiting, stats.used_blocks, stats.cached_blocks) >= 0, stats
    assert stats.used_blocks + stats.cached_blocks <= stats.total_blocks, stats
    assert stats.queued_prefill_tokens >= 0, stats
    assert stats.step_s >= 0, stats
    assert stats.busy_s >= 0, stats
    assert stats.steps > 0 or stats.busy_s == stats.steps == 0, stats
    assert stats.generated_tokens >= 0, stats
    assert 0 <= stats.cached_prompt_tokens <= stats.prompt_tokens, stats


def check_stream(deltas: Sequence[TokenDelta], request: GenerateRequest) -> Transcript:
    """Check all that the contract says of one whole stream, and put it together."""
    sampling = request.sampling
    assert deltas, "a stream without a delta"
    first, last = deltas[0], deltas[-1]
    assert first.prefill is not None
    assert all(delta.prefill is None for delta in deltas[1:])
    assert last.finish_reason is not None
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    assert all(delta.stop_token_id is None for delta in deltas[:-1])
    assert all(delta.token_ids for delta in deltas[1:-1]), "an empty delta in the middle"
    _check_times(deltas)
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    assert len(tokens) <= sampling.max_tokens
    assert not set(tokens) & set(sampling.stop_token_ids), "a stop token among the tokens"
    if last.finish_reason is FinishReason.STOP:
        assert last.stop_token_id in sampling.stop_token_ids
        assert len(tokens) >= sampling.min_tokens
    else:
        assert last.stop_token_id is None
    if last.finish_reason is FinishReason.LENGTH:
        assert len(tokens) == sampling.max_tokens
    assert 0 <= first.prefill.cached_tokens < request.prompt_tokens
    assert min(first.prefill.queue_s, first.prefill.prefill_s) >= 0
    return Transcript(tokens, last.finish_reason, last.stop_token_id, _join_logprobs(deltas, sampling), first.prefill)


def _check_times(deltas: Sequence[TokenDelta]) -> None:
    times = [delta.emitted_s for delta in deltas if delta.token_ids]
    assert times == sorted(times), "emitted_s goes backwards"
    assert all(times) or not any(times), "emitted_s is known for some deltas only"


def _join_logprobs(deltas: Sequence[TokenDelta], sampling: SamplingParams) -> tuple[TokenLogprob, ...] | None:
    if sampling.logprobs is None:
        assert all(delta.logprobs is None for delta in deltas), "logprobs that nobody asked for"
        return None
    for delta in deltas:
        assert [entry.token_id for entry in delta.logprobs or ()] == list(delta.token_ids)
    return tuple(entry for delta in deltas for entry in delta.logprobs or ())
