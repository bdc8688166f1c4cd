"""KvFeed: KV events on their way from the host to one consumer in the replica."""

import asyncio
from collections import deque

from serve.core.kv_events import KvEventBatch


class KvFeed:
    """Batches that wait for one consumer.

    Args:
        max_lag: Batches it may be behind. With one more all are dropped, and it has to ask for a snapshot.
    """

    def __init__(self, max_lag: int) -> None:
        self._max_lag = max_lag
        self._pending: deque[KvEventBatch] = deque()
        self._error: Exception | None = None
        self._ready = asyncio.Event()
        self.number = 0  # under which the host sends to it; 0: not at all

    def push(self, batch: KvEventBatch) -> bool:
        """Add a batch; return whether the consumer keeps up."""
        if len(self._pending) >= self._max_lag:
            self._pending.clear()
            self._ready.set()  # the consumer has to ask again
            return False
        self._pending.append(batch)
        self._ready.set()
        return True

    def fail(self, error: Exception) -> None:
        """Make the consumer raise, after what is there."""
        self._error = error
        self._ready.set()

    async def next(self) -> KvEventBatch | None:
        """Wait for the next batch; None if this feed was cut off, so that what comes next has to be a snapshot."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self.number:
                return None
            self._ready.clear()
            await self._ready.wait()
        return self._pending.popleft()
