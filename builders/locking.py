"""A store's lock for asyncio: waiting for it can be cancelled, and does not hold up the loop."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

from serve.artifacts.port import ArtifactStore, Lock


class _NobodyWaits(Exception):
    """The waiting was cancelled."""


@contextlib.asynccontextmanager
async def locked(store: ArtifactStore, key: str, holder: str, wait: Callable[[str], None]) -> AsyncIterator[Lock]:
    """Hold a lock.

    Args:
        store: Whose.
        key: Of the lock.
        holder: What others are told.
        wait: Told who holds it, about once a second, from another thread.
    """
    cancelled = threading.Event()

    def look(other: str) -> None:
        if cancelled.is_set():
            raise _NobodyWaits
        wait(other)

    context = store.lock(key, holder, wait=look)
    taking = asyncio.ensure_future(asyncio.to_thread(context.__enter__))
    try:
        lock = await asyncio.shield(taking)
    except asyncio.CancelledError:
        cancelled.set()
        with contextlib.suppress(_NobodyWaits):
            await taking  # it may have been taken just now
            await asyncio.to_thread(context.__exit__, None, None, None)
        raise
    try:
        yield lock
    finally:
        # Also if this is cancelled: whoever waits shall not wait for the lease to run out.
        await asyncio.shield(asyncio.to_thread(context.__exit__, None, None, None))
