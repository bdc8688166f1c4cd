"""Stream: one request's deltas on their way from the engine's thread to its generator on the event loop."""

import asyncio
from collections import deque
from collections.abc import Iterable

from serve.core.request import TokenDelta


class Stream:
    """A mailbox of deltas that ends with an exception or with the last delta. Lives on the event loop."""

    def __init__(self) -> None:
        self._items: deque[TokenDelta | Exception] = deque()
        self._ready = asyncio.Event()

    def put(self, item: TokenDelta | Exception) -> None:
        """Add a delta, or what the reader is to raise."""
        self._items.append(item)
        self._ready.set()

    async def get(self) -> TokenDelta:
        """Return the next delta, waiting for it; raise what was put to be raised."""
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


Delivery = tuple[Stream, TokenDelta | Exception]


def deliver(items: Iterable[Delivery]) -> None:
    """Put what one engine step yielded, for all streams together. On the event loop."""
    for stream, item in items:
        stream.put(item)
