"""DeltaInbox: where the deltas of one sequence wait for their reader."""

import asyncio

from serve.core.request import TokenDelta, merge_deltas


class DeltaInbox:
    """Deltas of one sequence on their way to one reader. At most one is queued: later ones are merged into it."""

    def __init__(self) -> None:
        self._queued: TokenDelta | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        """Add what came after the queued delta."""
        self._queued = delta if self._queued is None else merge_deltas(self._queued, delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with `error`, after what is queued; only the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def next(self) -> TokenDelta:
        """Wait for the next delta; raises the error that ended the stream."""
        while self._queued is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta, self._queued = self._queued, None
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
