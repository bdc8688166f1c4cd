"""Executors, seen from the LLM object: results by request id, errors, statistics, events (reference 2.5, 2.6, 4.1)."""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from trtllm_double import line, switches
from trtllm_double.async_queue import running_loop, wake_all
from trtllm_double.engine_request import EngineRequest
from trtllm_double.errors import EngineDeadError, RequestError
from trtllm_double.rank_loop import RankLoop
from trtllm_double.results import RequestOutput


class IterationResult:
    """Async iterator over statistics or events: ends after `timeout` seconds without data."""

    def __init__(self, executor: "Executor", kind: str) -> None:
        self._executor, self._kind, self._timeout = executor, kind, 2.0
        self._pending: deque[Any] = deque()

    def set_timeout(self, timeout: float) -> None:
        self._timeout = timeout

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        loop = self._executor.loop
        assert loop is None or loop is asyncio.get_running_loop(), (
            "double: an IterationResult is bound to the loop that made the first request (reference 2.6)"
        )
        deadline = time.monotonic() + self._timeout
        while not self._pending:
            self._pending.extend(await asyncio.to_thread(self._executor.take, self._kind))
            if not self._pending:
                if time.monotonic() >= deadline:
                    raise StopAsyncIteration
                await asyncio.sleep(0.01)
        return self._pending.popleft()


class Executor:
    """Base of all of them. Messages come by `receive`, from one thread."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.was_asked = False
        self._results: dict[int, RequestOutput] = {}
        self._lock = threading.Lock()
        self._errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self._pushed: dict[str, deque[Any]] = {"stats": deque(), "events": deque()}
        self._is_shutdown = False
        self._fatal: BaseException | None = None
        self.vocab_size = 0
        self.capacity: dict[str, int] = {}

    # What a kind of executor does in its own way

    def send(self, kind: str, value: Any = None) -> None:
        raise NotImplementedError

    def fetch(self, kind: str) -> list[Any]:
        """Read statistics or events of rank 0 directly (newest line)."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the ranks."""
        raise NotImplementedError

    # What they have in common

    def submit(self, request: EngineRequest, output: RequestOutput) -> None:
        self.raise_background_error(None)
        if output.loop is not None:
            if self.loop is None or self.loop.is_closed():
                self.loop = output.loop
            assert output.loop is self.loop, (
                "double: all requests of an LLM have to be made on one event loop (reference 2.3)"
            )
        with self._lock:
            self.was_asked = True
            self._results[request.id] = output
        if self._fatal is not None and line.current().notices_death:
            self._fail_all()
            return
        self.send("submit", request)

    def abort_request(self, request_id: int) -> None:
        self.send("cancel", request_id)

    def receive(self, message: tuple[str, Any]) -> None:
        """Handle a message of rank 0."""
        kind, value = message
        if kind == "responses":
            self._dispatch(value)
        elif kind == "fatal":
            self.on_fatal(value)
        else:
            self._pushed[kind].extend(value)

    def on_fatal(self, error: BaseException) -> None:
        """A background thread or worker failed: reference 2.5."""
        self._errors.put(error)
        self.on_death(error)

    def on_death(self, error: BaseException) -> None:
        """The newest line fails whatever is pending; 1.2.x lets it wait for ever."""
        self._fatal = error
        if line.current().notices_death:
            self._fail_all()

    def raise_background_error(self, _: Any) -> None:
        """Raise what the background put on the error queue; the engine is shut down by that."""
        try:
            error = self._errors.get_nowait()
        except queue.Empty:
            return
        if isinstance(error, str):
            raise RequestError(error)
        self.shutdown()
        raise error

    def take(self, kind: str) -> list[Any]:
        if not line.current().pushes:
            return self.fetch(kind) if self._fatal is None and not self._is_shutdown else []
        data = []
        while self._pushed[kind]:
            data.append(self._pushed[kind].popleft())
        return data

    def drain(self, kind: str, timeout_s: float) -> list[Any]:
        """Return all there is; always waits until nothing came for `timeout_s` (reference 2.6)."""
        if running_loop() is not None:
            switches.misuse(f"get_{kind} was called on the thread of an event loop: it blocks for its whole timeout")
        data: list[Any] = []
        deadline = time.monotonic() + timeout_s
        while True:
            new = self.take(kind)
            now = time.monotonic()
            if new:
                data += new
                deadline = now + timeout_s
            elif now >= deadline:
                return data
            time.sleep(max(0.0, min(0.02, deadline - now)))

    def is_shutdown(self) -> bool:
        return self._is_shutdown

    def check_health(self) -> bool:
        """1.2.x does not notice a dead worker; the newest line does (reference 2.5)."""
        if self._is_shutdown:
            return False
        return self._fatal is None if line.current().notices_death else True

    def shutdown(self) -> None:
        """End the engine. Requests in flight are not told."""
        with self._lock:
            if self._is_shutdown:
                return
            self._is_shutdown = True
        time.sleep(switches.number("SHUTDOWN_S", 0))
        while switches.fault_is_set("block_shutdown"):
            time.sleep(0.01)
        self.stop()

    def _dispatch(self, responses: list[Any]) -> None:
        queues = []
        for response in responses:
            with self._lock:
                output = self._results.get(response.id)
                if output is not None and (response.is_final or response.error is not None):
                    del self._results[response.id]
            if output is not None:
                queues.append(output.deliver(response))
        wake_all(q for q in queues if q is not None)

    def _fail_all(self) -> None:
        with self._lock:
            outputs = list(self._results.values())
            self._results.clear()
        queues = [output.deliver(EngineDeadError(f"Engine is dead: {self._fatal}")) for output in outputs]
        wake_all(q for q in queues if q is not None)


class InProcessExecutor(Executor):
    """GenerationExecutorWorker: TLLM_WORKER_USE_SINGLE_PROCESS=1 and one rank; no other process."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        from trtllm_double.engine_spec import make_core  # the model is loaded late, as everything heavy

        core = make_core(spec)
        self.vocab_size, self.capacity = core.model.vocab_size, core.capacity()
        self._loop = RankLoop(core, self.receive, lambda: None)
        self._loop.start()

    def send(self, kind: str, value: Any = None) -> None:
        self._loop.post(kind, value)

    def fetch(self, kind: str) -> list[Any]:
        return self._loop.take(kind)

    def stop(self) -> None:
        self._loop.post("stop")
        if threading.current_thread() is not self._loop._thread:
            self._loop.join()
