"""Threads for the library's blocking calls. All are daemons: a call that never returns must not keep the process."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


async def call_in_thread(function: Callable[[], T], name: str, *, discard: Callable[[T], object] | None = None) -> T:
    """Call a function in a thread of its own, which has no event loop, and return what it returns.

    If the caller is cancelled, the thread goes on; what it returns then is given to `discard`, in the thread.
    """
    call = _Call(function, discard, asyncio.get_running_loop())
    threading.Thread(target=call.run, name=name, daemon=True).start()
    try:
        return await call.done
    finally:
        call.abandon()


class _Call(Generic[T]):
    """A call whose caller may leave."""

    def __init__(
        self, function: Callable[[], T], discard: Callable[[T], object] | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._function = function
        self._discard = discard
        self._loop = loop
        self._lock = threading.Lock()
        self._is_abandoned = False
        self.done: asyncio.Future[T] = loop.create_future()

    def abandon(self) -> None:
        """Nobody waits any more. Harmless if the result was taken."""
        with self._lock:
            self._is_abandoned = True

    def run(self) -> None:
        try:
            result = self._function()
        except BaseException as exc:  # SystemExit too: it must reach the caller, not end a thread unseen
            self._post(self._fail, exc)
            return
        if not self._post(self._succeed, result):
            self._throw_away(result)

    def _post(self, deliver: Callable[..., None], value: object) -> bool:
        with self._lock:
            if self._is_abandoned or self._loop.is_closed():
                return False
            self._loop.call_soon_threadsafe(deliver, value)
            return True

    def _succeed(self, result: T) -> None:
        if not self.done.done():
            self.done.set_result(result)
        else:  # the caller left between the end of the call and now
            threading.Thread(target=self._throw_away, args=(result,), daemon=True).start()

    def _fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(
                error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
            )

    def _throw_away(self, result: T) -> None:
        if self._discard is not None:
            self._discard(result)


class Errands:
    """Carries out short calls in the background, in the order they come.

    Args:
        name: Of the threads.
        threads: How many; a call that blocks holds one up.
    """

    def __init__(self, name: str, threads: int = 4) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def send(self, call: Callable[[], None]) -> None:
        """Have a call made; it has to catch its own exceptions."""
        self._calls.put(call)

    def stop(self) -> None:
        """End the threads, once they have made the calls that wait."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
