"""SimulatedEngine: the scheduler in real time, behind the Engine port.

No thread and no task: one timer, the end of the present step. Deadlines are absolute, so delays of the event loop do
not add up: after a step that ended late, the next one ends on time.
"""

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator
from importlib.metadata import version

import msgspec
import numpy as np
import numpy.typing as npt

from serve.core.kv_events import KvEventBatch, KvLedger
from serve.core.request import FinishReason, GenerateRequest, TokenDelta, TokenLogprob
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.simulated.faults import Fault, FaultScript
from serve.engines.simulated.sampling import Sampler, describe, draw_seed
from serve.engines.simulated.scheduler import Scheduler
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.simulated.stream import LiveSequence
from serve.engines.simulated.tokens import TokenSource
from serve.errors import ContextTooLong, EngineDead, Overloaded, RequestError

_MAX_LATE_STEPS = 8  # steps made up for before other callbacks of the loop get their turn
_LOGPROBS_SLICE = 64  # prompt tokens described before others get their turn
_START_FAULTS = frozenset({"fail_start"})
_REQUEST_FAULTS = frozenset({"error_request"})
_STEP_FAULTS = frozenset({"die", "exit", "hang", "slow"})


class SimulatedEngine:
    """Engine port over a `Scheduler`.

    Args:
        settings: Checked.
    """

    def __init__(self, settings: SimulatedSettings) -> None:
        self._settings = settings
        self._limits = settings.make_limits()
        self._latency = settings.latency.make_model()
        first, last = settings.generated_ids
        self._source = TokenSource(settings.seed, settings.vocab_size, first, last)
        self._ledger = KvLedger()
        self._faults = FaultScript(settings.faults)
        self._scheduler: Scheduler[LiveSequence] = Scheduler(self._limits, self._latency)
        self._live: dict[str, LiveSequence] = {}
        self._dead: str | None = "the engine has not been started"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None  # the end of the step, or the begin of the first
        self._fault_timers: list[asyncio.Handle] = []
        self._hung = False
        self._due_s = 0.0
        self._step_s = 0.0
        self._slow: tuple[float, float] = (1.0, 0.0)  # factor, until when
        self._started_s = 0.0
        self._requests = 0
        self._generated = 0
        self._steps = 0
        self._busy_s = 0.0
        self._info = EngineInfo(
            engine=f"simulated {version('raytrt')}",
            context_tokens=min(settings.context_tokens, self._limits.total_blocks * self._limits.tokens_per_block),
            vocab_size=settings.vocab_size,
            tokens_per_block=self._limits.tokens_per_block,
            total_blocks=self._limits.total_blocks,
            device="simulated",
            max_logprobs=settings.max_logprobs,
        )

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started."""
        return self._info

    async def start(self) -> None:
        """Wait for as long as a start takes.

        Raises:
            EngineDead: A `fail_start` fault is due.
        """
        if self._settings.start_s:
            await asyncio.sleep(self._settings.start_s)
        if self._faults.due(_START_FAULTS) is not None:
            raise EngineDead("simulated fault: the engine does not start")
        self._loop = asyncio.get_running_loop()
        self._started_s = time.monotonic()
        self._dead = None
        for fault in self._settings.faults:
            if fault.at_s:  # it may come to pass while nothing else does
                self._fault_timers.append(self._loop.call_later(fault.at_s + 0.002, self._check_faults))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens, as the port says."""
        sequence = self._accept(request)
        try:
            delta = await sequence.take()
            if request.sampling.prompt_logprobs is not None and delta.prefill is not None:
                described = await self._describe_prompt(request.prompt_array(), request.sampling.prompt_logprobs)
                prefill = msgspec.structs.replace(delta.prefill, prompt_logprobs=described)
                delta = msgspec.structs.replace(delta, prefill=prefill)
            yield delta
            while delta.finish_reason is None:
                delta = await sequence.take()
                yield delta
        finally:
            self._live.pop(request.request_id, None)
            self._scheduler.end(sequence)

    def stats(self) -> EngineStats:
        """Return the present load."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=len(scheduler.waiting),
            used_blocks=scheduler.pool.used_blocks,
            cached_blocks=scheduler.pool.idle_blocks,
            total_blocks=self._limits.total_blocks,
            queued_prefill_tokens=scheduler.queued_prefill_tokens,
            step_s=self._step_s,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            generated_tokens=self._generated,
            steps=self._steps,
            busy_s=self._busy_s,
            computed_prompt_tokens=scheduler.computed_prompt_tokens,
            computed_prompt_pairs=scheduler.computed_prompt_pairs,
        )

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache, as the port says."""
        return self._ledger.read()

    def cache_content(self) -> frozenset[int]:
        """Return the hashes of all blocks that can be reused, as the block pool has them."""
        return self._scheduler.pool.content()

    def check_health(self) -> None:
        """Raise `EngineDead` after a fault, before `start` and after `stop`."""
        if self._dead is not None:
            raise EngineDead(self._dead)

    def inject(self, fault: Fault) -> None:
        """Let something go wrong now, whatever the fault waits for; `fail_start` and `error_request` have no effect."""
        if fault.kind == "die":
            self._die("simulated fault: a rank was lost")
        elif fault.kind == "exit":
            os._exit(fault.exit_code)
        elif fault.kind == "slow":
            self._slow = (fault.factor, time.monotonic() + (math.inf if fault.for_s is None else fault.for_s))
        elif fault.kind == "hang":
            self._hang(fault.for_s)

    async def stop(self) -> None:
        """End everything."""
        self._die("the engine was stopped")

    # Requests

    def _accept(self, request: GenerateRequest) -> LiveSequence:
        self.check_health()
        self._check(request)
        if self._due_fault(_REQUEST_FAULTS) is not None:
            raise RequestError("simulated fault: this request is refused", code="simulated_fault")
        scheduler = self._scheduler
        free = 0 if scheduler.blocked else self._limits.max_batch_size - scheduler.running
        if len(scheduler.waiting) >= self._settings.max_waiting + free:
            raise Overloaded(f"{len(scheduler.waiting)} requests are waiting already", self._retry_after_s())
        prompt = request.prompt_array()
        seed = draw_seed(request.sampling, request.request_id)
        sampler = Sampler(self._source, request.sampling, prompt, seed, self._settings.stop_hazard)
        sequence = LiveSequence(request, prompt, sampler, self._limits.tokens_per_block)
        scheduler.submit(sequence, time.monotonic())
        self._live[request.request_id] = sequence
        self._requests += 1
        if self._timer is None and not self._hung:
            # Not at once: requests that arrive in the same iteration of the loop go into the same step.
            self._timer = self._event_loop.call_soon(self._run)
        return sequence

    def _check(self, request: GenerateRequest) -> None:
        info, sampling = self.info, request.sampling
        if request.request_id in self._live:
            raise RequestError(f"request_id: {request.request_id!r} is in flight already; make it unique", "request_id")
        prompt = request.prompt_array()
        if not len(prompt):
            raise RequestError("the prompt is empty: send at least one token", param="prompt")
        if len(prompt) + sampling.max_tokens > info.context_tokens:
            asked = sampling.max_tokens if len(prompt) < info.context_tokens else None
            raise ContextTooLong(len(prompt), asked, info.context_tokens)
        if not self._limits.fits(len(prompt), sampling.max_tokens):
            raise ContextTooLong(len(prompt), sampling.max_tokens, self._limits.max_num_tokens)
        highest = max(int(prompt.max()), *sampling.logit_bias, *sampling.stop_token_ids, 0)
        if highest >= info.vocab_size:
            raise RequestError(f"token id {highest} is not below the vocabulary size {info.vocab_size}")
        for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
            if count is not None and not 0 <= count <= info.max_logprobs:
                raise RequestError(f"{name}={count} is not between 0 and {info.max_logprobs}", param=name)

    def _retry_after_s(self) -> float:
        """Estimate when a place will be free: a sequence has to end, and those here are about half done."""
        steps = [sequence.max_tokens for sequence in self._scheduler.decoding.sequences]
        left = min(steps, default=0) * 0.5
        return min(60.0, max(0.1, left * self._step_s))

    async def _describe_prompt(self, prompt: npt.NDArray[np.uint32], count: int) -> tuple[TokenLogprob | None, ...]:
        described: list[TokenLogprob | None] = []
        for state, token in zip(self._source.states(prompt), prompt.tolist(), strict=True):
            described.append(describe(self._source, state, token, count) if described else None)
            if len(described) % _LOGPROBS_SLICE == 0:
                await asyncio.sleep(0)
        return tuple(described)

    # Steps

    def _run(self) -> None:
        """Complete the step that is due, and begin the next one; and again, while these are late."""
        for _ in range(_MAX_LATE_STEPS):
            if self._scheduler.in_step:
                self._complete()
                if self._dead is not None or self._hung:
                    return
                # A step that takes time began when the one before it should have ended.
                begin_s = self._due_s if self._step_s else time.monotonic()
            else:
                begin_s = time.monotonic()
            duration_s = self._scheduler.begin(begin_s)
            if duration_s is None:
                self._timer = None
                return
            self._step_s = self._real_s(duration_s, begin_s)
            self._due_s = begin_s + self._step_s
            delay_s = self._due_s - time.monotonic()
            if delay_s > 0.0:
                self._timer = self._event_loop.call_later(delay_s, self._run)
                return
            if not self._step_s:
                break  # as fast as possible, but readers have their turn after each step
        self._timer = self._event_loop.call_soon(self._run)

    def _real_s(self, duration_s: float, begin_s: float) -> float:
        factor, until_s = self._slow
        if begin_s < until_s:
            duration_s *= factor
        return duration_s / self._settings.speed if self._settings.speed else 0.0

    def _complete(self) -> None:
        scheduler = self._scheduler
        decoding = list(scheduler.decoding.sequences)  # each of them gets one token, whatever becomes of it then
        result = scheduler.complete(self._due_s)
        self._steps += 1
        self._busy_s += self._step_s
        now_s = time.monotonic()
        for sequence in decoding:
            self._emit(sequence, now_s)
        for sequence in result.prefilled:
            if sequence.output_tokens:
                self._emit(sequence, now_s)
        for sequence in result.finished:
            sequence.finish(FinishReason.LENGTH)
        self._ledger.record(scheduler.take_events())
        self._check_faults()

    def _emit(self, sequence: LiveSequence, now_s: float) -> None:
        if sequence.emit(now_s):
            self._generated += 1
        else:
            self._scheduler.end(sequence)

    # Faults

    @property
    def _event_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

    def _due_fault(self, kinds: frozenset[str]) -> Fault | None:
        running_s = time.monotonic() - self._started_s
        return self._faults.due(kinds, tokens=self._generated, requests=self._requests, running_s=running_s)

    def _check_faults(self) -> None:
        if self._settings.faults and self._dead is None:
            fault = self._due_fault(_STEP_FAULTS)
            if fault is not None:
                self.inject(fault)

    def _hang(self, for_s: float | None) -> None:
        self._hung = True
        self._cancel_timer()
        if for_s is not None:
            self._fault_timers.append(self._event_loop.call_later(for_s, self._resume))

    def _resume(self) -> None:
        self._hung = False
        self._timer = self._event_loop.call_soon(self._run)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _die(self, reason: str) -> None:
        if self._dead is None or not self._started_s:  # what killed it first is what matters
            self._dead = reason
        self._cancel_timer()
        for timer in self._fault_timers:
            timer.cancel()
        self._fault_timers.clear()
        live, self._live = list(self._live.values()), {}
        for sequence in live:
            self._scheduler.end(sequence)
            sequence.fail(EngineDead(self._dead))
