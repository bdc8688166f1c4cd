"""TrtllmEngine: TensorRT-LLM's LLM API behind the `Engine` port."""

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from serve.core.kv_events import KvEventBatch, KvLedger
from serve.core.parallel import ParallelLayout
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.request_checks import check_request
from serve.engines.trtllm.feed import EngineFeed
from serve.engines.trtllm.flights import Flight, Flights
from serve.engines.trtllm.loaded import Loaded, load
from serve.engines.trtllm.orchestration import Orchestration
from serve.engines.trtllm.pollers import HealthPoller
from serve.engines.trtllm.pump import ABORT_S, pump
from serve.engines.trtllm.sampling import check_sampling, sampling_keywords
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.startup import shut_down_in_thread
from serve.engines.trtllm.stats import retry_after_s, waiting_of
from serve.errors import EngineDead, Overloaded, RequestError

_log = logging.getLogger(__name__)

Load = Callable[[Path, TrtllmSettings, ParallelLayout, Orchestration], Awaitable[Loaded]]
PROBE_AFTER_S = 30.0  # without a request
POKE_AFTER_S = 3.0  # without a response to any of those in flight
PROBE_TIMEOUT_S = 60.0
READER_END_S = 1.0


class TrtllmEngine:
    """One model on the GPUs of its ranks. One a process; lives on the event loop that started it.

    Args:
        model_dir: A Hugging Face checkpoint, a TensorRT-LLM checkpoint or an engine directory, on this node.
        settings: What the operator chose.
        layout: How the engine is cut.
        orchestration: Who starts the ranks.
        load: Makes the library's object.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: TrtllmSettings,
        layout: ParallelLayout,
        orchestration: Orchestration,
        *,
        load: Load = load,
    ) -> None:
        self._model_dir = model_dir
        self._settings = settings
        self._layout = layout
        self._orchestration = orchestration
        self._load = load
        self._ledger = KvLedger()
        self._loaded: Loaded | None = None
        self._info: EngineInfo | None = None
        self._feed: EngineFeed | None = None
        self._health: HealthPoller | None = None
        self._flights = Flights(1)
        self._starting: asyncio.Task[None] | None = None
        self._prober: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: EngineDead | None = None
        self._last_stats = EngineStats()
        self._last_progress_s = 0.0
        self._names = itertools.count()
        self._is_stuck = False

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started. Only valid after `start`."""
        if self._info is None:
            raise RuntimeError("the engine has not started")
        return self._info

    @property
    def is_stuck(self) -> bool:
        """Whether TensorRT-LLM did not shut down in time, so that only the end of its process frees the GPUs."""
        return self._is_stuck

    async def start(self) -> None:
        """Load the model on every rank, and generate one token.

        Raises:
            ConfigError: The model, the settings, the installation or the machine do not fit.
            BundleMismatch: The engine was built by another version of TensorRT-LLM.
            EngineDead: TensorRT-LLM failed, or did not start within `start_timeout_s`; or `stop` was called.
        """
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.ensure_future(self._start())
        try:
            await self._starting
        except asyncio.CancelledError:
            if self._dead is not None:  # it was stop that cancelled
                raise _again(self._dead) from None
            self._starting.cancel()
            raise
        except EngineDead as exc:
            self._die(exc)
            raise

    async def _start(self) -> None:
        loaded = await self._load(self._model_dir, self._settings, self._layout, self._orchestration)
        self._flights = Flights(loaded.info.tokens_per_block)
        self._feed = EngineFeed(loaded, self._settings, self._ledger)
        self._health = HealthPoller(loaded.llm, self._report_sickness)
        self._loaded, self._info = loaded, loaded.info
        self._feed.start()
        self._health.start()
        self._prober = asyncio.ensure_future(self._keep_probing())
        self._last_progress_s = time.monotonic()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream output tokens in order. Closing the generator cancels the request and frees its KV blocks.

        Raises:
            RequestError: The request can never be served here.
            Overloaded: As many requests are waiting as the settings allow.
            EngineDead: The engine died or was stopped.
        """
        flight = self._submit(request)
        try:
            while True:
                delta = await flight.inbox.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._leave(flight)

    def stats(self) -> EngineStats:
        """Return the latest load; nothing runs in an engine that is dead."""
        if self._feed is None or self._dead is not None:
            return self._last_stats
        return self._feed.stats(self._flights.counts())

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache: a snapshot, then every change."""
        async with aclosing(self._ledger.read()) as batches:
            async for batch in batches:
                yield batch

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine is not started, died or was stopped."""
        if self._dead is not None:
            raise _again(self._dead)
        if self._loaded is None:
            raise EngineDead("the engine has not started")

    async def stop(self) -> None:
        """End everything within `stop_timeout_s`. Running generators raise `EngineDead`; see `is_stuck`."""
        self._die(EngineDead("the engine was stopped"))
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
            self._is_stuck = True  # the thread that loads goes on
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.errands.stop()
            if self._feed is not None:
                await asyncio.to_thread(self._feed.join, READER_END_S)
            self._is_stuck = not await shut_down_in_thread(loaded.llm, self._settings.stop_timeout_s)

    def _submit(self, request: GenerateRequest) -> Flight:
        """Check a request, and give it to the engine.

        Raises:
            RequestError, Overloaded, EngineDead: As `generate` does.
        """
        self.check_health()
        loaded, feed = self._loaded, self._feed
        assert loaded is not None, "check_health raised"
        assert feed is not None, "check_health raised"
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("TensorRT-LLM wakes all requests through one event loop: generate on that of start")
        self._check(request, loaded)
        self._check_load(feed)
        name = str(next(self._names))
        keywords = sampling_keywords(request, loaded.support, secrets.randbits(63))
        try:
            flight = loaded.submit(name, request, keywords)
        except EngineDead as exc:
            self._die(exc)
            raise
        if not len(self._flights):
            self._note_progress()
        self._flights.add(flight)
        flight.task = asyncio.ensure_future(pump(flight, loaded, self._flights, self._die, self._note_progress))
        return flight

    def _check(self, request: GenerateRequest, loaded: Loaded) -> None:
        if self._flights.has(request.request_id):
            raise RequestError(f"request_id: {request.request_id!r} is in flight already; make it unique", "request_id")
        info = loaded.info
        capacity_tokens = info.total_blocks * info.tokens_per_block
        check_request(request, info, capacity_tokens, "engine.kv_cache.memory_fraction or max_tokens")
        check_sampling(request.sampling, loaded.support, request.prompt_tokens, info.vocab_size)
        step_tokens = loaded.limits.step_tokens
        if step_tokens is not None and request.prompt_tokens > step_tokens:
            raise RequestError(
                f"the prompt has {request.prompt_tokens} tokens, but only {step_tokens} can be computed at once; "
                "shorten it, or have the operator set engine.chunked_prefill: true",
                "prompt",
                "prompt_too_long",
            )

    def _check_load(self, feed: EngineFeed) -> None:
        own, record, batch = self._flights.counts(), feed.record(), feed.max_batch_size
        waiting, most = waiting_of(own, record, batch), self._settings.max_waiting
        is_full = own.submitted + own.streaming >= batch or waiting > 0
        if is_full and waiting >= most:
            raise Overloaded(
                f"{waiting} requests are waiting, and max_waiting is {most}", retry_after_s(record, waiting, batch)
            )

    def _leave(self, flight: Flight) -> None:
        """Let a request be aborted, if the engine has not ended it; off the event loop, as that may block."""
        self._flights.leave(flight)
        if flight.is_over or self._loaded is None or self._dead is not None:
            return
        self._loaded.abort(flight)
        assert self._loop is not None, "it was started"
        self._loop.call_later(ABORT_S, _give_up, flight)

    def _note_progress(self) -> None:
        self._last_progress_s = time.monotonic()

    async def _keep_probing(self) -> None:
        """Generate a token now and then while the engine tells nothing: only that shows whether it still can."""
        while True:
            await asyncio.sleep(1.0)
            quiet_s = time.monotonic() - self._last_progress_s
            if quiet_s >= (POKE_AFTER_S if len(self._flights) else PROBE_AFTER_S):
                await self._probe()
                self._note_progress()

    async def _probe(self) -> None:
        """Generate one token.

        With requests in flight the answer may be long in coming, and the watchdog of the group looks after them. But
        asking alone makes 1.2.x raise an error of its background threads, which it tells nobody of otherwise.
        """
        assert self._loaded is not None, "it was started"
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._loaded.probe()
        except TimeoutError:
            if not len(self._flights):
                self._die(EngineDead(f"an idle engine did not generate one token in {PROBE_TIMEOUT_S:.0f} s"))
        except EngineDead as exc:
            self._die(exc)
        except RequestError as exc:
            _log.warning("A probe of the engine failed: %s", exc)

    def _report_sickness(self, reason: str) -> None:
        """Called by the health thread."""
        assert self._loop is not None, "it was started"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._die, EngineDead(reason))

    def _die(self, error: EngineDead) -> None:
        if self._dead is not None:
            return
        if self._feed is not None:
            stats = self._feed.stats(self._flights.counts())
            self._last_stats = replace(stats, running=0, waiting=0, used_blocks=0, queued_prefill_tokens=0)
            self._feed.stop()
        self._dead = error
        if self._health is not None:
            self._health.stop()
        if self._prober is not None:
            self._prober.cancel()
        for flight in self._flights:
            flight.inbox.fail(_again(error))
            self._flights.remove(flight)
            if flight.task is not None:
                flight.task.cancel()  # in 1.2.x nothing else ends the wait for a dead worker
        _log.log(
            logging.INFO if str(error) == "the engine was stopped" else logging.ERROR,
            "The TensorRT-LLM engine of process %d has ended: %s.",
            os.getpid(),
            error,
        )


def _give_up(flight: Flight) -> None:
    """Wait no longer for the end of an aborted request."""
    if not flight.is_over and flight.task is not None:
        _log.warning("Request %s was aborted, but the engine never said so.", flight.request.request_id)
        flight.task.cancel()


def _again(error: EngineDead) -> EngineDead:
    """Copy an error that many tasks raise, each with a traceback of its own."""
    return EngineDead(*error.args)
