"""KV events: what is in an engine's KV cache, told as changes.

`KvLedger` is the engine's side: it records what was stored and removed, holds the resulting content, and serves any
number of readers, each of which sees a snapshot first and then every change.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable

import msgspec


class KvStored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Blocks that can be reused from now on.

    Attributes:
        block_hashes: A chain: each is the parent of the next (`serve.core.blocks`).
        parent: Hash of the block before the first, or the chain's seed.
    """

    block_hashes: tuple[int, ...]
    parent: int


class KvRemoved(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Blocks that cannot be reused any more."""

    block_hashes: tuple[int, ...]


class KvSnapshot(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """All that can be reused; whatever was known before is void.

    Attributes:
        block_hashes: Every block, in any order.
        parents: Each one's parent, in the same order.
    """

    block_hashes: tuple[int, ...]
    parents: tuple[int, ...]


KvEvent = KvStored | KvRemoved | KvSnapshot


class KvEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events of one engine step, in order.

    Attributes:
        sequence: Counts the engine's changes. A batch that begins with a snapshot may have any number; each other
            batch has the number of the batch before plus one.
        events: At least one.
    """

    sequence: int
    events: tuple[KvEvent, ...]


class KvLedger:
    """Content of one engine's KV cache, and the events that led to it. Thread-safe.

    Args:
        max_lag: Batches a reader may be behind before it gets a snapshot instead.
    """

    def __init__(self, max_lag: int = 1024) -> None:
        self._max_lag = max_lag
        self._lock = threading.Lock()
        self._parents: dict[int, int] = {}
        self._sequence = 0
        self._readers: list[_Reader] = []

    def record(self, events: Iterable[KvStored | KvRemoved]) -> None:
        """Apply the changes of one step, and tell every reader. From any thread."""
        batch_events = tuple(events)
        if not batch_events:
            return
        with self._lock:
            for event in batch_events:
                if isinstance(event, KvStored):
                    parent = event.parent
                    for block_hash in event.block_hashes:
                        self._parents[block_hash] = parent
                        parent = block_hash
                else:
                    for block_hash in event.block_hashes:
                        self._parents.pop(block_hash, None)
            self._sequence += 1
            batch = KvEventBatch(self._sequence, batch_events)
            for reader in self._readers:
                reader.push(batch, self._max_lag)

    def content(self) -> frozenset[int]:
        """Return the hashes of all blocks that can be reused now."""
        with self._lock:
            return frozenset(self._parents)

    async def read(self) -> AsyncGenerator[KvEventBatch, None]:
        """Yield a snapshot, then each change as it happens; another snapshot if this reader fell behind."""
        reader = _Reader(asyncio.get_running_loop())
        with self._lock:
            self._readers.append(reader)
            batch: KvEventBatch | None = self._snapshot()
        try:
            while True:
                if batch is not None:
                    yield batch
                else:
                    await reader.wait()
                with self._lock:
                    batch = self._snapshot() if reader.take_overrun() else reader.pop()
        finally:
            with self._lock:
                self._readers.remove(reader)

    def _snapshot(self) -> KvEventBatch:
        snapshot = KvSnapshot(tuple(self._parents), tuple(self._parents.values()))
        return KvEventBatch(self._sequence, (snapshot,))


class _Reader:
    """Batches on their way to one consumer. Called under the ledger's lock, except `wait`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._pending: deque[KvEventBatch] = deque()
        self._overrun = False

    def push(self, batch: KvEventBatch, max_lag: int) -> None:
        if self._overrun:
            return
        self._pending.append(batch)
        if len(self._pending) > max_lag:
            self._overrun = True
            self._pending.clear()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    def take_overrun(self) -> bool:
        overrun, self._overrun = self._overrun, False
        return overrun

    def pop(self) -> KvEventBatch | None:
        return self._pending.popleft() if self._pending else None

    async def wait(self) -> None:
        await self._ready.wait()
        self._ready.clear()
