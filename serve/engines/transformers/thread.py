"""EngineThread: the thread that owns the model, its inbox, and its death."""

import asyncio
import atexit
import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from serve.core.kv_events import KvLedger
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.transformers.generation import Generation
from serve.engines.transformers.library import Batcher, MakeBatcher
from serve.engines.transformers.loading import LoadedModel, load_model
from serve.engines.transformers.rendezvous import TensorRank
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.transformers.step_loop import StepLoop, out_of_memory
from serve.engines.transformers.stream import deliver
from serve.engines.transformers.team import Team
from serve.errors import ConfigError, EngineDead, RayTRTError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What is known once the model is loaded.

    Attributes:
        info: Of the engine.
        capacity_tokens: Longest sequence that the KV cache holds.
    """

    info: EngineInfo
    capacity_tokens: int


class EngineThread:
    """Everything that touches the model happens in here. The methods are for the event loop's thread.

    Args:
        model_dir: Checkpoint.
        settings: Of the engine.
        kv_ledger: Told of every change of the cache.
        on_death: Called on the event loop, at least once, if the thread cannot go on.
        tensor_rank: Who this is in a tensor-parallel group: its rank 0.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: TransformersSettings,
        kv_ledger: KvLedger,
        on_death: Callable[[EngineDead], None],
        tensor_rank: TensorRank | None = None,
    ) -> None:
        self._model_dir = model_dir
        self._settings = settings
        self._kv_ledger = kv_ledger
        self._on_death = on_death
        self._tensor_rank = tensor_rank
        self._team: Team | None = None
        self._loss: RayTRTError | None = None
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Started] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._condition = threading.Condition()
        self._inbox: list[Generation] = []
        self._cancels: list[str] = []
        self._in_hand: list[Generation] = []
        self._stopping = False
        self._stats = EngineStats()
        self._step_began_s: float | None = None
        self._begin_interval_s = 0.0
        self.steps: StepLoop | None = None
        self._thread = threading.Thread(target=self._main, name="transformers-engine", daemon=True)

    async def start(self) -> Started:
        """Load the model and warm up.

        Raises:
            ConfigError: The model, the settings or the machine do not fit.
        """
        atexit.register(self._end_with_interpreter)
        self._thread.start()
        return await asyncio.shield(self._started)

    async def stop(self, timeout_s: float) -> bool:
        """End the thread; False if it was still computing after `timeout_s`."""
        self._ask_to_end()
        if not self._thread.ident:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            if self._team is not None:
                self._team.abort()  # a rank hangs, and with it whatever is computed together
                self._team.dismiss("rank 0 was stopped in the middle of a step")
            return False
        return True

    def submit(self, generation: Generation) -> None:
        """Hand a checked request over."""
        with self._condition:
            self._inbox.append(generation)
            self._condition.notify()

    def cancel(self, name: str) -> None:
        """Have a request forgotten; harmless if it is over."""
        with self._condition:
            self._cancels.append(name)
            self._condition.notify()

    def stats(self) -> EngineStats:
        """Return the load after the last step, and what has arrived since."""
        with self._condition:
            arrived = (*self._in_hand, *self._inbox)
            return replace(
                self._stats,
                waiting=self._stats.waiting + len(arrived),
                queued_prefill_tokens=self._stats.queued_prefill_tokens
                + sum(generation.request.prompt_tokens for generation in arrived),
            )

    def num_queued(self) -> int:
        """Return how many requests found no room at the last step."""
        return self._stats.waiting

    @property
    def begin_interval_s(self) -> float:
        """Usual time between two sequences that begin."""
        return self._begin_interval_s

    def step_age_s(self) -> float:
        """Return how long the step in progress has taken; 0 if there is none."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def _reason(self) -> str | None:
        """Why the other ranks have to end; None if all is as it should be."""
        return None if self._loss is None else str(self._loss)

    def _ask_to_end(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._team is not None and self.steps is None:
            self._team.dismiss(self._reason)  # the thread may be waiting for what they load

    def _end_with_interpreter(self) -> None:
        """End an engine that nobody stopped: a thread inside PyTorch crashes an interpreter that is going away."""
        self._ask_to_end()
        self._thread.join(self._settings.stop_timeout_s)

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                self._load_and_serve()
        except Exception as exc:
            self._die(exc)
        finally:
            if self._team is not None:
                self._team.dismiss(self._reason)
                self._team.abort()
            self.steps = None
            gc.collect()  # the model and the library's parts refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            atexit.unregister(self._end_with_interpreter)
            self._call(self._ended.set)

    def _load_and_serve(self) -> None:
        try:
            steps, started = self._load()
        except Exception as exc:
            self._loss = exc if isinstance(exc, RayTRTError) else self._unsupported(exc)
            self._call(self._fail_start, self._loss)
            return
        self.steps = steps
        self._publish(steps)
        self._call(self._succeed_start, started)
        while self._take(steps):
            self._step_began_s = time.monotonic()
            deliveries = steps.tick()
            self._step_began_s = None
            self._publish(steps)
            if deliveries:
                self._call(deliver, deliveries)

    def _load(self) -> tuple[StepLoop, Started]:
        make_batcher: MakeBatcher = Batcher
        if self._tensor_rank is None:
            loaded = load_model(self._model_dir, self._settings)
        else:
            self._team = Team(self._tensor_rank, self._settings, self._lose, lambda: self._stopping)
            loaded = self._team.load(self._model_dir, self._settings)
            make_batcher = self._team.make_batcher
        if loaded.device.type == "cuda":
            torch.cuda.set_device(loaded.device)
        steps = _make_steps(loaded, self._settings, self._kv_ledger, make_batcher)
        if self._settings.warm_up:
            began_s = time.monotonic()
            try:
                steps.warm_up()
            except RayTRTError:
                raise
            except Exception as exc:
                error = self._unsupported(exc)
                raise (error if self._team is None else self._team.verdict(error)) from exc
            _log.info("warmed up in %.1f s", time.monotonic() - began_s)
        info = EngineInfo(
            engine=f"transformers {transformers.__version__}",
            context_tokens=loaded.context_tokens,
            vocab_size=loaded.vocab_size,
            tokens_per_block=self._settings.tokens_per_block,
            total_blocks=steps.total_blocks,
            device=loaded.device.type,
        )
        return steps, Started(info, steps.capacity_tokens)

    def _unsupported(self, exc: Exception) -> ConfigError:
        return ConfigError(
            f"model: continuous batching of transformers {transformers.__version__} cannot serve {self._model_dir}; "
            f"perhaps not its architecture, or memory is short: {type(exc).__name__}: {str(exc)[:300]}"
        )

    def _take(self, steps: StepLoop) -> bool:
        """Wait until there is something to do, and take what has arrived; False if the thread is to end."""
        with self._condition:
            while not (self._stopping or self._inbox or self._cancels or steps.is_busy):
                self._condition.wait()
            if self._stopping:
                return False
            self._in_hand, self._inbox = self._inbox, []
            cancels, self._cancels = self._cancels, []
        for generation in self._in_hand:
            try:
                steps.accept(generation)
            except (torch.OutOfMemoryError, MemoryError) as exc:
                _log.error("no memory for a prompt of %d tokens: %s", generation.request.prompt_tokens, exc)
                self._call(generation.stream.put, out_of_memory())
        for name in cancels:
            steps.cancel(name)
        return True

    def _publish(self, steps: StepLoop) -> None:
        stats = steps.stats()
        self._begin_interval_s = steps.begin_interval_s
        with self._condition:
            self._stats = stats
            self._in_hand = []

    def _die(self, exc: Exception) -> None:
        # Without its traceback, whose frames would keep the model in memory for as long as anyone keeps the error.
        own: RayTRTError = exc if isinstance(exc, RayTRTError) else EngineDead(f"the engine died: {exc!r}")
        error = own if self._team is None else self._team.verdict(own)
        _log.error("the engine died: %s", error, exc_info=exc if error is own else None)
        self._loss = self._loss or error
        self._call(self._on_death, EngineDead(str(error)))

    def _lose(self, error: RayTRTError) -> None:
        """Die since another rank did; on any thread, whatever this one is doing."""
        self._loss = self._loss or error
        self._call(self._fail_start, error)
        self._call(self._on_death, EngineDead(str(error)))
        self._ask_to_end()

    def _succeed_start(self, started: Started) -> None:
        if not self._started.done():
            self._started.set_result(started)

    def _fail_start(self, error: RayTRTError) -> None:
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # whoever awaited it may have given up

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Call on the event loop; nothing, if it is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            _log.debug("the event loop is closed")


def _make_steps(
    loaded: LoadedModel, settings: TransformersSettings, kv_ledger: KvLedger, make_batcher: MakeBatcher
) -> StepLoop:
    """Make the step loop with as large a cache as fits, if the settings leave its size open."""
    num_blocks = loaded.num_blocks
    while True:
        try:
            return StepLoop(replace(loaded, num_blocks=num_blocks), settings, kv_ledger, make_batcher)
        except (MemoryError, torch.OutOfMemoryError) as exc:
            smaller = num_blocks * 9 // 10
            if loaded.is_exact or smaller < 2:
                raise ConfigError(
                    f"engine: a KV cache of {num_blocks} blocks of {settings.tokens_per_block} tokens does not fit the "
                    f"memory ({exc}); lower kv_cache_tokens, kv_cache_bytes or max_num_tokens"
                ) from exc
            _log.info("a KV cache of %d blocks does not fit the memory; trying %d", num_blocks, smaller)
            num_blocks = smaller
        gc.collect()  # of what was made before the memory was short; its parts refer to each other
