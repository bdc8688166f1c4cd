"""TransformersEngine: Hugging Face continuous batching behind the `Engine` port."""

import itertools
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from serve.core.kv_events import KvEventBatch, KvLedger
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.transformers.admission import check_request, queue_places, retry_after_s
from serve.engines.transformers.settings import TransformersSettings
from serve.errors import ConfigError, EngineDead, Overloaded, RequestError

try:
    from serve.engines.transformers.generation import Generation
    from serve.engines.transformers.rendezvous import TensorRank
    from serve.engines.transformers.stream import Stream
    from serve.engines.transformers.thread import EngineThread, Started
except ImportError as exc:
    raise ConfigError(
        f"engine: the transformers engine cannot be imported ({exc}); install it with: pip install 'raytrt[cpu]'"
    ) from exc

_log = logging.getLogger(__name__)


class TransformersEngine:
    """One model on the CPU or on one GPU of this process. Lives on one event loop; the model, on a thread of its own.

    Args:
        model_dir: A Hugging Face checkpoint: config.json and *.safetensors.
        settings: What the operator chose.
        tensor_rank: Rank 0 of a tensor-parallel group, whose other ranks call `tensor_parallel.run_follower`; None if
            the whole model is here.
    """

    def __init__(self, model_dir: Path, settings: TransformersSettings, tensor_rank: TensorRank | None = None) -> None:
        if tensor_rank is not None and not tensor_rank.leads:
            raise ValueError(f"rank {tensor_rank.rank} of a tensor-parallel group has no engine; see run_follower")
        self._tensor_rank = tensor_rank
        self._model_dir = model_dir
        self._settings = settings
        self._kv_ledger = KvLedger()
        self._thread: EngineThread | None = None
        self._started: Started | None = None
        self._dead: EngineDead | None = None
        self._last_stats = EngineStats()
        self._streams: dict[str, Stream] = {}
        self._names = itertools.count()

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started. Only valid after `start`."""
        if self._started is None:
            raise RuntimeError("the engine has not started")
        return self._started.info

    async def start(self) -> None:
        """Load the model and warm up, off the event loop.

        Raises:
            ConfigError: The model directory, the settings or the machine do not fit, or the tensor ranks each other.
            EngineDead: A tensor rank is gone, or has not come.
        """
        self._thread = EngineThread(self._model_dir, self._settings, self._kv_ledger, self._die, self._tensor_rank)
        self._started = await self._thread.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream output tokens in order. Closing the generator cancels the request and frees its KV blocks.

        Raises:
            RequestError: The request can never be served here.
            Overloaded: As many requests are waiting as the settings allow.
            EngineDead: The engine died or was stopped.
        """
        self.check_health()
        thread, started = self._thread, self._started
        assert thread is not None, "check_health raised"
        assert started is not None, "check_health raised"
        if request.request_id in self._streams:
            raise RequestError(f"request_id: {request.request_id!r} is in flight already; make it unique", "request_id")
        check_request(request, started.info, started.capacity_tokens)
        self._check_load(thread)
        stream = self._streams[request.request_id] = Stream()
        name = str(next(self._names))  # a request id may come again before the thread has forgotten it
        thread.submit(Generation(name, request, stream, time.monotonic()))
        is_over = False
        try:
            while not is_over:
                delta = await stream.get()
                is_over = delta.finish_reason is not None
                yield delta
        finally:
            self._streams.pop(request.request_id, None)
            if not is_over:
                thread.cancel(name)

    def stats(self) -> EngineStats:
        """Return the latest load; nothing runs in an engine that is dead."""
        if self._thread is None or self._dead is not None:
            return self._last_stats
        return self._thread.stats()

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache: a snapshot, then every change."""
        async with aclosing(self._kv_ledger.read()) as batches:
            async for batch in batches:
                yield batch

    def cache_content(self) -> frozenset[int]:
        """Return what the library's own table holds, as our hashes: the truth that KV events have to add up to.

        Only while no request runs; the engine's thread changes the table.
        """
        steps = self._thread.steps if self._thread is not None else None
        return steps.cache_content() if steps is not None else frozenset()

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine is not started, died, was stopped, or hangs in a step."""
        if self._dead is not None:
            raise _again(self._dead)
        if self._thread is None or self._started is None:
            raise EngineDead("the engine has not started")
        age_s = self._thread.step_age_s()
        if age_s > self._settings.max_step_s:
            raise EngineDead(f"one step has taken {age_s:.0f} s; max_step_s is {self._settings.max_step_s:.0f}")

    async def stop(self) -> None:
        """End the thread after the step it computes, and release the model. Running generators raise `EngineDead`."""
        self._die(EngineDead("the engine was stopped"))
        if self._thread is not None and not await self._thread.stop(self._settings.stop_timeout_s):
            _log.error("a step is still being computed %.0f s after stop; giving up", self._settings.stop_timeout_s)

    def _check_load(self, thread: EngineThread) -> None:
        """Raise Overloaded if there is no place left: in the batch, or in the queue before it."""
        stats, settings = thread.stats(), self._settings
        places = queue_places(
            running=stats.running,
            queued=thread.num_queued(),
            max_batch_size=settings.max_batch_size,
            max_waiting=settings.max_waiting,
        )
        if stats.waiting >= places:
            raise Overloaded(
                f"{stats.waiting} requests are waiting, and max_waiting is {settings.max_waiting}",
                retry_after_s(thread.begin_interval_s, stats.waiting, settings.max_batch_size),
            )

    def _die(self, error: EngineDead) -> None:
        if self._dead is not None:
            return
        if self._thread is not None:
            stats = self._thread.stats()
            self._last_stats = replace(stats, running=0, waiting=0, used_blocks=0, queued_prefill_tokens=0)
        self._dead = error
        for stream in self._streams.values():
            stream.put(_again(error))


def _again(error: EngineDead) -> EngineDead:
    """Copy an error that many tasks raise, each with a traceback of its own."""
    return EngineDead(*error.args)
