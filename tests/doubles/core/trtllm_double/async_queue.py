"""A queue that engine threads fill and one event loop empties."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Any


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop that runs in this thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class AsyncQueue:
    """Made on a loop, awaited on it; `put` from any thread, followed by `wake_all`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._event = asyncio.Event()

    def put(self, item: Any) -> None:
        self._items.append(item)

    async def get(self, timeout: float | None = None) -> Any:
        """Return the next item.

        Raises:
            TimeoutError: None came in `timeout` seconds.
        """
        while not self._items:
            self._event.clear()
            if self._items:
                break
            if timeout is None:
                await self._event.wait()
            else:
                await asyncio.wait_for(self._event.wait(), timeout)
        return self._items.popleft()

    @property
    def is_empty(self) -> bool:
        return not self._items

    def wake(self) -> None:
        self._event.set()


def wake_all(queues: Iterable[AsyncQueue]) -> None:
    """Wake the readers of a batch through the loop of the first queue, as upstream does (reference 2.3)."""
    queues = list(queues)
    if not queues:
        return

    def wake() -> None:
        for queue in queues:
            queue.wake()

    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
        queues[0].loop.call_soon_threadsafe(wake)
