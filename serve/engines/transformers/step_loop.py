"""StepLoop: what the engine's thread does between two looks at its inbox. Knows no thread and no event loop."""

import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass

import torch

from serve.core.kv_events import KvLedger
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.protocol import EngineStats
from serve.engines.transformers.admission import may_begin
from serve.engines.transformers.generation import Generation
from serve.engines.transformers.library import Batcher, BatchOptions, Entry, MakeBatcher
from serve.engines.transformers.loading import LoadedModel
from serve.engines.transformers.sampling import Samples, sample
from serve.engines.transformers.scoring import PromptScoring, chunk_tokens
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.stream import Delivery, Stream
from serve.errors import Overloaded, RequestError

_log = logging.getLogger(__name__)

_MAX_OOM_STEPS = 3  # one after the other; then the engine gives up


@dataclass
class _Totals:
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    computed_prompt_tokens: int = 0
    computed_prompt_pairs: float = 0.0


class StepLoop:
    """Requests in, deltas out, one step at a time.

    Args:
        loaded: The model.
        settings: Sizes and limits.
        kv_ledger: Told of every change of the cache, before the deltas of the step are out.
        make_batcher: Makes the batcher: the class itself, or one that leads other ranks.

    Raises:
        ConfigError: The library does not support the model.
        MemoryError: The cache does not fit.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: TransformersSettings,
        kv_ledger: KvLedger,
        make_batcher: MakeBatcher = Batcher,
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._kv_ledger = kv_ledger
        self._secret = secrets.token_bytes(32)
        options = BatchOptions(
            num_blocks=loaded.num_blocks,
            tokens_per_block=settings.tokens_per_block,
            max_batch_size=settings.max_batch_size,
            max_num_tokens=loaded.max_num_tokens,
            context_tokens=loaded.context_tokens,
            prefix_sharing=settings.prefix_sharing,
        )
        self._batcher = make_batcher(loaded.model, options, self._choose, self._note_match)
        self._scoring: deque[tuple[Generation, PromptScoring]] = deque()
        self._waiting: deque[Generation] = deque()
        self._running: dict[str, Generation] = {}
        self._step: tuple[list[str], Samples] | None = None
        self._oom_steps = 0
        self._step_s = 0.0
        self._begin_interval_s = 0.0
        self._last_begin_s: float | None = None
        self._totals = _Totals()

    @property
    def total_blocks(self) -> int:
        """KV blocks of the cache."""
        return self._batcher.ledger.total_blocks

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence that the cache holds if there is no other."""
        # 5.17 takes one block more than a sequence needs, now and then.
        return (self.total_blocks - 1) * self._settings.tokens_per_block

    @property
    def begin_interval_s(self) -> float:
        """Usual time between two sequences that begin; 0 before the second."""
        return self._begin_interval_s

    @property
    def is_busy(self) -> bool:
        """Whether `tick` has something to do."""
        return bool(self._running or self._waiting or self._scoring)

    def accept(self, generation: Generation) -> None:
        """Take a request that `check_request` has let pass.

        Raises:
            torch.OutOfMemoryError, MemoryError: There is no memory for it; it was not taken.
        """
        sampling, loaded = generation.request.sampling, self._loaded
        if sampling.max_tokens:
            size, seed = self._settings.tokens_per_block, secrets.randbits(64)
            generation.prepare(size, self._secret, seed, loaded.vocab_size, loaded.device)
        if sampling.prompt_logprobs is None:
            self._waiting.append(generation)
            return
        prompt = generation.request.prompt_array()
        forward = self._batcher.begin_scoring(prompt, chunk_tokens(loaded.max_num_tokens, loaded.vocab_size))
        self._scoring.append((generation, PromptScoring(forward, sampling.prompt_logprobs)))

    def cancel(self, name: str) -> None:
        """Forget a request, wherever it is; its blocks are free after the next `tick`."""
        if name in self._running:
            del self._running[name]
            self._batcher.cancel(name)
            return
        self._waiting = deque(g for g in self._waiting if g.name != name)
        for generation, scoring in self._scoring:
            if generation.name == name:
                scoring.close()
        self._scoring = deque((g, s) for g, s in self._scoring if g.name != name)

    def tick(self) -> list[Delivery]:
        """Compute one step of the batch, and one chunk of the prompt that is being scored."""
        deliveries: list[Delivery] = []
        self._score(deliveries)
        began_s = time.monotonic()
        self._begin(deliveries)
        started_s = time.monotonic()
        try:
            stepped = self._batcher.step(self._note_scheduled)
        except (torch.OutOfMemoryError, MemoryError) as exc:
            self._drop_step(exc, deliveries)
        else:
            if stepped:
                self._emit(deliveries)
                self._step_s = time.monotonic() - started_s
                self._oom_steps = 0
                self._totals.steps += 1
                self._totals.busy_s += time.monotonic() - began_s
        self._kv_ledger.record(self._batcher.events.drain(self._batcher.ledger.shared.changes))
        return deliveries

    def stats(self) -> EngineStats:
        """Return the load after the last `tick`."""
        free, cached = self._batcher.ledger.free_and_cached()
        pending = [g.pending_prefill_tokens for g in (*self._waiting, *self._running.values())]
        scored = [g.request.prompt_tokens for g, _ in self._scoring]
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._scoring),
            used_blocks=self.total_blocks - free - cached,
            cached_blocks=cached,
            total_blocks=self.total_blocks,
            queued_prefill_tokens=sum(pending) + sum(scored),
            step_s=self._step_s,
            prompt_tokens=self._totals.prompt_tokens,
            cached_prompt_tokens=self._totals.cached_prompt_tokens,
            generated_tokens=self._totals.generated_tokens,
            steps=self._totals.steps,
            busy_s=self._totals.busy_s,
            computed_prompt_tokens=self._totals.computed_prompt_tokens,
            computed_prompt_pairs=self._totals.computed_prompt_pairs,
        )

    def cache_content(self) -> frozenset[int]:
        """Return the hashes of all blocks in the library's own table. Only while nothing runs, or on the thread."""
        return self._batcher.events.hashes(self._batcher.ledger.shared)

    def warm_up(self) -> None:
        """Run prefill, decode and sampling once, and leave no trace."""
        longest = min(self._loaded.max_num_tokens, self._loaded.context_tokens - 3, self.capacity_tokens - 3)
        sampling = SamplingParams(top_p=0.9, max_tokens=3, logprobs=1)
        for i, tokens in enumerate((max(1, longest), 1)):
            prompt = pack_tokens([i] * tokens)
            request = GenerateRequest(f"warm-up-{i}", "", prompt, sampling, cache_salt=secrets.token_hex())
            self.accept(Generation(request.request_id, request, Stream(), time.monotonic()))
        while self.is_busy:
            self.tick()
        self._batcher.forget_cached()
        self._kv_ledger.record(self._batcher.events.drain(self._batcher.ledger.shared.changes))
        self._totals = _Totals()
        self._last_begin_s, self._begin_interval_s = None, 0.0

    def _score(self, deliveries: list[Delivery]) -> None:
        if not self._scoring:
            return
        generation, scoring = self._scoring[0]
        generation.begun_s = generation.begun_s or time.monotonic()
        try:
            generation.prompt_logprobs = scoring.advance()
        except (torch.OutOfMemoryError, MemoryError) as exc:
            if not self._batcher.survives_failed_steps:
                raise
            _log.error("scoring a prompt of %d tokens ran out of memory: %s", generation.request.prompt_tokens, exc)
            self._scoring.popleft()
            deliveries.append((generation.stream, out_of_memory()))
            return
        if generation.prompt_logprobs is not None:
            self._scoring.popleft()
            self._waiting.append(generation)

    def _begin(self, deliveries: list[Delivery]) -> None:
        """Move sequences from the queue into the batch, in order, as far as there is room."""
        if self._batcher.num_preempted():
            return  # they come first
        followers: list[Generation] = []
        while self._waiting:
            generation = self._waiting.popleft()
            if generation.request.sampling.max_tokens == 0:
                self._totals.prompt_tokens += generation.request.prompt_tokens
                deliveries.append((generation.stream, generation.emit_nothing(time.monotonic())))
                continue
            matching = self._batcher.matching_blocks(generation.chain)
            if self._is_being_computed(generation, len(matching)):
                followers.append(generation)
            elif self._has_room(generation, matching):
                sampling = generation.request.sampling
                entry = Entry(generation.name, generation.chain, sampling.max_tokens, sampling.stop_token_ids)
                self._batcher.add(entry)
                self._running[generation.name] = generation
            else:
                self._waiting.appendleft(generation)
                break
        self._waiting.extendleft(reversed(followers))

    def _is_being_computed(self, generation: Generation, block: int) -> bool:
        """Return whether a running prompt will soon have the first block that this one lacks.

        The same prompt several times at once (n > 1, or many clients with one system prompt) is then computed once.
        """
        size = self._settings.tokens_per_block
        if not self._batcher.shares_prefixes or (generation.request.prompt_tokens - 1) // size <= block:
            return False
        key = generation.chain.key(block)
        return any(
            other.num_output == 0 and other.request.prompt_tokens // size > block and other.chain.key(block) == key
            for other in self._running.values()
        )

    def _has_room(self, generation: Generation, matching: list[int]) -> bool:
        size, ledger = self._settings.tokens_per_block, self._batcher.ledger
        free, cached = ledger.free_and_cached()
        promised = sum(
            max(0, -(-other.pending_prefill_tokens // size)) for other in self._running.values() if not other.num_output
        )
        return may_begin(
            running=len(self._running),
            max_batch_size=self._settings.max_batch_size,
            needed_blocks=generation.chain.num_tokens // size + 1 - len(matching),
            promised_blocks=promised,
            free_blocks=free + cached - ledger.num_cached(matching),
        )

    def _note_match(self, name: str, tokens: int) -> None:
        generation = self._running.get(name)
        if generation is not None and not generation.was_scheduled:
            generation.cached_tokens = tokens

    def _note_scheduled(self, batch: list[tuple[str, int]]) -> None:
        now_s = time.monotonic()
        for name, tokens in batch:
            generation = self._running[name]
            self._count_prefill(generation, tokens)
            generation.computed_tokens += tokens
            if not generation.was_scheduled:
                generation.was_scheduled = True
                generation.begun_s = generation.begun_s or now_s
                self._totals.prompt_tokens += generation.request.prompt_tokens
                self._totals.cached_prompt_tokens += generation.cached_tokens
                if self._last_begin_s is not None:
                    interval_s = now_s - self._last_begin_s
                    self._begin_interval_s += 0.1 * (interval_s - self._begin_interval_s)
                self._last_begin_s = now_s

    def _count_prefill(self, generation: Generation, tokens: int) -> None:
        done = generation.cached_tokens + generation.computed_tokens
        chunk = min(tokens, generation.request.prompt_tokens - done)
        if chunk > 0 and not generation.num_output:
            self._totals.computed_prompt_tokens += chunk
            self._totals.computed_prompt_pairs += chunk * done + chunk * (chunk + 1) * 0.5

    def _choose(self, logits: torch.Tensor, names: list[str]) -> list[int]:
        samples = sample(logits, [self._running[name].row for name in names])
        self._step = (names, samples)
        broken = set(samples.broken)
        for i, (name, token_id) in enumerate(zip(names, samples.token_ids, strict=True)):
            if i not in broken:
                self._running[name].chain.append(token_id)
        return samples.token_ids

    def _emit(self, deliveries: list[Delivery]) -> None:
        """Turn what the step chose into deltas."""
        if self._step is None:
            return  # nothing but parts of prompts
        (names, samples), self._step = self._step, None
        broken = set(samples.broken)
        now_s = time.monotonic()
        for i, name in enumerate(names):
            generation = self._running[name]
            if i in broken:
                self.cancel(name)
                deliveries.append((generation.stream, _overflow(self._loaded)))
                continue
            delta = generation.emit(samples.token_ids[i], samples.logprobs[i], now_s)
            self._totals.generated_tokens += len(delta.token_ids)
            deliveries.append((generation.stream, delta))
            if delta.finish_reason is not None:
                del self._running[name]
        if broken:
            _log.error("%d sequences had logits that are not finite; the prefix cache is emptied", len(broken))
            self._batcher.scrub()

    def _drop_step(self, exc: Exception, deliveries: list[Delivery]) -> None:
        """Give up the sequences of a step that ran out of memory, and go on with the others."""
        self._oom_steps += 1
        if self._oom_steps >= _MAX_OOM_STEPS or not self._batcher.survives_failed_steps:
            raise exc
        self._step = None
        names = self._batcher.drop_step()
        _log.error("a step of %d sequences ran out of memory; they are given up: %s", len(names), exc)
        for name in names:
            generation = self._running.pop(name, None)
            if generation is not None:
                deliveries.append((generation.stream, out_of_memory()))
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()


def out_of_memory() -> Overloaded:
    """Return what a request is told for which there was no memory."""
    return Overloaded("the engine ran out of memory; try again, with a shorter prompt if it goes on", 2.0)


def _overflow(loaded: LoadedModel) -> RequestError:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return RequestError(
        f"the model computed no finite logits for this request in {dtype}; have the operator serve it with dtype "
        "bfloat16 or float32, or check the checkpoint",
        code="model_overflow",
    )
