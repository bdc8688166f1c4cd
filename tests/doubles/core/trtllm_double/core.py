"""EngineCore: in-flight batching over the block cache, one step at a time. No thread, no channel."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtllm_double import line, sampler
from trtllm_double.cache import BlockCache
from trtllm_double.engine_request import EngineRequest, EngineResponse
from trtllm_double.events import EventBuffer
from trtllm_double.iteration_stats import StepWork, iteration_record, request_metrics, request_record
from trtllm_double.model import Chunk, KvBuffer, LlamaModel
from trtllm_double.sequence import Sequence


@dataclass(frozen=True)
class CoreLimits:
    """What the engine arguments come to. Blocks are of `tokens_per_block` tokens."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    primary_blocks: int
    secondary_blocks: int
    chunked_prefill: bool
    guaranteed: bool
    reuse: bool
    partial_reuse: bool
    min_offload_priority: int
    event_buffer: int
    attention_windows: list[int]
    attention_dp_rank: int | None
    stats: bool
    request_stats: bool
    max_stats_len: int
    includes_end_id: bool


class EngineDiedError(Exception):
    """The step loop failed: the engine is lost."""


class EngineCore:
    """The state of one rank 0."""

    def __init__(self, model: LlamaModel, limits: CoreLimits) -> None:
        self.model, self.limits = model, limits
        blocks = [limits.primary_blocks, limits.secondary_blocks]
        self.events = EventBuffer(limits.event_buffer, limits.attention_windows, blocks, limits.attention_dp_rank)
        self.cache = BlockCache(
            limits.primary_blocks,
            limits.secondary_blocks,
            limits.tokens_per_block,
            self.events,
            reuse=limits.reuse,
            partial_reuse=limits.partial_reuse,
            min_offload_priority=limits.min_offload_priority,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats: deque[dict[str, Any]] = deque(maxlen=limits.max_stats_len if limits.max_stats_len > 0 else None)
        self._cancelled: set[int] = set()
        self._iteration = 0
        self._new_active = self._completed = 0
        self._empty_requests = 0
        self._dp_rank = limits.attention_dp_rank

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: EngineRequest) -> EngineResponse | None:
        """Queue a request; return an error response if it is refused."""
        problem = sampler.check(request)
        room = self.limits.max_seq_len - len(request.prompt)
        if problem is None and room <= 0:
            problem = (
                f"default_max_tokens ({room}) must be greater than 0, default_max_tokens is the max_seq_len "
                f"({self.limits.max_seq_len}) minus the prompt length ({len(request.prompt)})"
            )
        if problem is None and any(not 0 <= token < self.model.vocab_size for token in request.prompt):
            problem = f"Token ID is not in the range [0, {self.model.vocab_size})"
        if problem is not None:
            return EngineResponse(request.id, error=problem, is_final=True)
        if request.max_tokens <= 0:
            self._empty_requests += 1
            if self._empty_requests > 1:  # reference 7.3, issue 7692
                raise EngineDiedError("CUDA error: an illegal memory access was encountered (max_tokens=0)")
        # Upstream cuts what the context cannot hold, and warns.
        sequence = Sequence(request, min(max(request.max_tokens, 1), room), time.perf_counter())
        self.waiting.append(sequence)
        return None

    def cancel(self, request_id: int) -> None:
        self._cancelled.add(request_id)

    def step(self, on_chosen: Callable[[], None] = lambda: None) -> list[EngineResponse]:
        """Run one step: admit, compute, draw, answer. `on_chosen` is called before anything is computed."""
        started = time.perf_counter()
        responses = self._end_cancelled()
        self._admit()
        chunks = self._plan()
        if not chunks:
            self.events.flush()
            return responses
        on_chosen()
        prefill = sum(len(chunk.tokens) for _, chunk in chunks if len(chunk.tokens) > 1)
        contexts = sum(1 for sequence, _ in chunks if not sequence.output)
        logits = self.model.forward([chunk for _, chunk in chunks])
        for (sequence, chunk), rows in zip(chunks, logits, strict=True):
            response = self._advance(sequence, chunk, rows)
            if response is not None:
                responses.append(response)
        self.events.flush()
        self._iteration += 1
        if self.limits.stats:
            work = StepWork(
                time.perf_counter() - started, len(chunks), contexts, prefill, self._new_active, self._completed
            )
            self.stats.append(self._record(work))
            self._completed = 0
        return responses

    def fail_step(self, text: str) -> list[EngineResponse]:
        """Do as upstream when the forward pass raises: whatever is active ends with the text; the loop goes on."""
        responses = self._end_cancelled()
        self._admit()
        active = list(self.running)
        for sequence in active:
            self._end(sequence, "CANCELLED")
        return responses + [EngineResponse(s.request.id, error=text, is_final=True) for s in active]

    def capacity(self) -> dict[str, int]:
        """Reference 1.4: what get_kv_cache_capacity() returns; the GPU's pool only."""
        blocks, size = self.limits.primary_blocks, self.limits.tokens_per_block
        return {"maxNumBlocks": blocks, "tokensPerBlock": size, "maxNumTokens": blocks * size}

    def _record(self, work: StepWork) -> dict[str, Any]:
        record = iteration_record(self._iteration, work, self.cache, self.limits.max_batch_size)
        record |= {"numActiveRequests": len(self.running), "numQueuedRequests": len(self.waiting)}
        if self.limits.request_stats:
            record["requestStats"] = [request_record(s, self.cache) for s in [*self.running, *self.waiting]]
        return record

    def _end_cancelled(self) -> list[EngineResponse]:
        if not self._cancelled:
            return []
        cancelled = [s for s in (*self.waiting, *self.running) if s.request.id in self._cancelled]
        self._cancelled.clear()
        return [self._end(sequence, "CANCELLED") for sequence in cancelled]

    def _admit(self) -> None:
        self._new_active = 0
        while self.waiting and len(self.running) < self.limits.max_batch_size:
            sequence = self.waiting[0]
            tokens = sequence.tokens
            # Another prompt with the same blocks is being computed: TensorRT-LLM waits for them if reuse is on.
            if self.limits.reuse and self._is_being_computed(sequence):
                break
            request = sequence.request
            total = len(request.prompt) + sequence.max_tokens - 1
            admitted = self.cache.admit(
                tokens, request.salt_id, request.lora_id, max(total, len(tokens)), pledge=self.limits.guaranteed
            )
            if admitted is None:
                if not self.running:
                    raise EngineDiedError(f"request {request.id} can never be scheduled")
                break
            sequence.holding, reused, parts = admitted
            sequence.kv = KvBuffer(self.model, len(tokens) + 32)
            at = 0
            for part in parts:
                sequence.kv.copy_in(at, part)
                at += part.shape[3]
            sequence.computed, sequence.target = reused, len(tokens)
            if not sequence.scheduled_s:
                sequence.scheduled_s, sequence.cached = time.perf_counter(), reused
            self.waiting.popleft()
            self.running.append(sequence)
            self._new_active += 1

    def _is_being_computed(self, sequence: Sequence) -> bool:
        size = self.limits.tokens_per_block
        shared, _ = self.cache.match(sequence.tokens, sequence.request.salt_id, sequence.request.lora_id)
        end = (len(shared) + 1) * size
        if end >= len(sequence.tokens):
            return False
        head = sequence.tokens[:end]
        key = (sequence.request.salt_id, sequence.request.lora_id)
        return any(
            not other.prompt_stored
            and (other.request.salt_id, other.request.lora_id) == key
            and len(other.request.prompt) > end
            and other.request.prompt[:end] == head
            for other in self.running
        )

    def _plan(self) -> list[tuple[Sequence, Chunk]]:
        plan: list[tuple[Sequence, Chunk]] = []
        decoding = [s for s in self.running if s.target - s.computed == 1 and s.output]
        for sequence in decoding:
            if sequence in self.running and not self._grow(sequence):
                continue  # paused: it computes its tokens again later
        decoding = [s for s in decoding if s in self.running]
        budget = self.limits.max_num_tokens
        for sequence in decoding:
            plan.append((sequence, self._chunk(sequence, 1)))
            budget -= 1
        for sequence in self.running:
            left = sequence.target - sequence.computed
            if sequence in decoding or left <= 0:
                continue
            count = left
            if left > budget:
                count = budget - (sequence.computed + budget) % self.limits.tokens_per_block
                if not self.limits.chunked_prefill or count <= 0:
                    break
            plan.append((sequence, self._chunk(sequence, count)))
            budget -= count
        return plan

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that the block of the next token is there; MAX_UTILIZATION may have to pause the youngest."""
        assert sequence.holding is not None
        have = len(sequence.holding.shared) + sequence.holding.private
        while have < self.cache.blocks_for(sequence.target):
            if self.cache.grow(sequence.holding):
                have += 1
                continue
            victim = self.running[-1]
            self._pause(victim)
            if victim is sequence:
                return False
        return True

    def _pause(self, sequence: Sequence) -> None:
        assert sequence.holding is not None
        self.cache.release(sequence.holding)
        self.running.remove(sequence)
        sequence.holding, sequence.kv, sequence.computed, sequence.prompt_stored = None, None, 0, False
        self.waiting.appendleft(sequence)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        assert sequence.kv is not None
        start = sequence.computed
        wants_all = not sequence.output and bool(
            sequence.request.return_context_logits or sequence.request.prompt_logprobs
        )
        return Chunk(sequence.tokens[start : start + count], start, sequence.kv, wants_all)

    def _advance(self, sequence: Sequence, chunk: Chunk, rows: Any) -> EngineResponse | None:
        request = sequence.request
        assert sequence.holding is not None
        sequence.computed += len(chunk.tokens)
        if chunk.all_logits:
            sequence.context_logits.append(rows)
        if sequence.computed < sequence.target:
            return None
        if not sequence.prompt_stored:  # blocks of the context become reusable when it is complete, full ones only
            sequence.prompt_stored = True
            self.cache.store(sequence.holding, request.prompt, sequence.kv, partial=False)
        row = rows[-1]
        token = sampler.next_token(row, request, sequence.output)
        logprobs = sampler.log_softmax(row)
        sequence.cumulative += float(logprobs[token])
        if request.logprobs is not None and (request.logprobs or line.current().zero_logprobs):
            sequence.logprobs.append(sampler.describe(logprobs, request.logprobs, token))
        if request.return_generation_logits:
            sequence.generation_logits.append(row)
        sequence.output.append(token)
        sequence.iterations += 1
        sequence.target += 1
        if not sequence.first_token_s:
            sequence.first_token_s = time.perf_counter()
        if sequence.computed % self.limits.tokens_per_block == 0 and sequence.computed > len(request.prompt):
            self.cache.store(sequence.holding, sequence.tokens, sequence.kv, partial=False)
        return self._answer(sequence, token)

    def _answer(self, sequence: Sequence, token: int) -> EngineResponse | None:
        request = sequence.request
        finish = self._finish_reason(sequence, token)
        if finish is not None:
            return self._end(sequence, finish)
        if request.streaming and (sequence.iterations == 1 or sequence.iterations % request.stream_interval == 0):
            return self._response(sequence, None)
        return None

    def _finish_reason(self, sequence: Sequence, token: int) -> str | None:
        """Upstream's order: end id, length, stop words; so a stop word in the last place is LENGTH."""
        request, output = sequence.request, sequence.output
        if token == request.end_id:
            if not self.limits.includes_end_id:  # the C++ sampler does not count it, the PyTorch one appends it
                output.pop()
                sequence.logprobs = sequence.logprobs[: len(output)]
            return "END_ID"
        if len(output) >= sequence.max_tokens:
            return "LENGTH"
        if any(output[-len(word) :] == word for word in request.stop_words):
            return "STOP_WORDS"
        return None

    def _end(self, sequence: Sequence, finish: str) -> EngineResponse:
        if sequence.holding is not None:
            assert sequence.kv is not None
            if sequence.computed >= len(sequence.request.prompt):
                # Everything whose keys and values were computed, with a partial block at the end.
                self.cache.store(
                    sequence.holding, [*sequence.tokens[: sequence.computed], 0], sequence.kv, partial=True
                )
            self.cache.release(sequence.holding)
            sequence.holding = None
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._completed += 1
        response = self._response(sequence, finish)
        sequence.kv = None
        return response

    def _response(self, sequence: Sequence, finish: str | None) -> EngineResponse:
        request, sent = sequence.request, sequence.sent
        sequence.sent = len(sequence.output)
        response = EngineResponse(
            request.id,
            sequence.output[sent:],
            cached_tokens=sequence.cached,
            decoding_iter=sequence.iterations,
            cumulative_logprob=sequence.cumulative,
            finish=finish,
            is_final=finish is not None,
        )
        if request.logprobs is not None:
            response.logprobs = sequence.logprobs[sent:]
        if finish is not None and request.return_generation_logits and sequence.generation_logits:
            response.generation_logits = _stack(sequence.generation_logits)
        if sequence.context_logits:
            # With a prefix hit they are of the computed tokens only: shorter than the prompt, and upstream does not
            # say so (NVIDIA/Model-Optimizer issue 1577).
            rows = _stack(sequence.context_logits)
            if request.return_context_logits:
                response.context_logits = rows
            if request.prompt_logprobs:
                response.prompt_logprobs = self._prompt_logprobs(sequence, rows)
            sequence.context_logits = []
        if finish is not None:
            response.metrics = request_metrics(sequence)
        return response

    def _prompt_logprobs(self, sequence: Sequence, rows: Any) -> list[list[tuple[int, float, int]]]:
        count = sequence.request.prompt_logprobs or 0
        following: list[int | None] = [None] * len(rows)
        if line.current().describes_prompt:
            following = [*(sequence.request.prompt + sequence.output[:1])[-len(rows) :]]
        return [
            sampler.describe(sampler.log_softmax(row), count, token) for row, token in zip(rows, following, strict=True)
        ]


def _stack(rows: list[Any]) -> Any:
    import numpy as np

    return np.concatenate([row if row.ndim == 2 else row[None] for row in rows])
