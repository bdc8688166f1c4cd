"""KV events: what is in an engine's KV cache, told as changes.

`KvLedger` is the engine's side: it records what was stored and removed, holds the resulting content, and serves any
number of readers, each of which sees a snapshot first and then every change. `KvDraft` puts changes into few events.

A block is in one tier: the fastest from which it can be reused. Reading it from a slower one costs a copy, not a
computation.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable

import msgspec

GPU, HOST, DISK = 0, 1, 2  # tiers, fastest first


class KvStored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Blocks that can be reused from now on, or that moved to another tier.

    Attributes:
        block_hashes: A chain: each is the parent of the next (`serve.core.blocks`).
        parent: Hash of the block before the first, or the chain's seed.
        tier: Where they are now.
    """

    block_hashes: tuple[int, ...]
    parent: int
    tier: int = GPU


class KvRemoved(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Blocks that cannot be reused any more, from no tier."""

    block_hashes: tuple[int, ...]


class KvSnapshot(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """All that can be reused; whatever was known before is void.

    Attributes:
        block_hashes: Every block, in any order.
        parents: Each one's parent, in the same order.
        tiers: Each one's tier, in the same order; empty if all are `GPU`.
    """

    block_hashes: tuple[int, ...]
    parents: tuple[int, ...]
    tiers: tuple[int, ...] = ()


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


class KvDraft:
    """Changes in the making: consecutive ones that one event can say become one event."""

    def __init__(self) -> None:
        self._events: list[KvStored | KvRemoved] = []
        self._hashes: list[int] = []
        self._stored: tuple[int, int] | None = None  # parent of the first and tier of all, if they are stored

    def store(self, block_hash: int, parent: int, tier: int = GPU) -> None:
        """Note that a block can be reused from now on, or moved."""
        goes_on = self._stored is not None and self._stored[1] == tier and self._hashes[-1] == parent
        if not goes_on:
            self._close()
            self._stored = (parent, tier)
        self._hashes.append(block_hash)

    def remove(self, block_hash: int) -> None:
        """Note that a block cannot be reused any more."""
        if self._stored is not None:
            self._close()
        self._hashes.append(block_hash)

    def finish(self) -> list[KvStored | KvRemoved]:
        """Return the events of all changes since the last call, in order."""
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._hashes:
            hashes = tuple(self._hashes)
            self._events.append(KvRemoved(hashes) if self._stored is None else KvStored(hashes, *self._stored))
        self._hashes = []
        self._stored = None


class KvLedger:
    """Content of one engine's KV cache, and the events that led to it. Thread-safe.

    Args:
        max_lag: Batches a reader may be behind before it gets a snapshot instead.
    """

    def __init__(self, max_lag: int = 1024) -> None:
        self._max_lag = max_lag
        self._lock = threading.Lock()
        self._parents: dict[int, int] = {}
        self._slow: dict[int, int] = {}  # tiers of those blocks that are not on the GPU
        self._sequence = 0
        self._readers: list[_Reader] = []

    def record(self, events: Iterable[KvStored | KvRemoved]) -> None:
        """Apply the changes of one step, and tell every reader. From any thread."""
        self._publish(tuple(events))

    def record_afresh(self, events: Iterable[KvStored | KvRemoved]) -> None:
        """Forget all that was recorded, then `record`; as one batch, which begins with an empty snapshot."""
        self._publish((KvSnapshot((), ()), *events))

    def content(self) -> frozenset[int]:
        """Return the hashes of all blocks that can be reused now, whatever their tier."""
        with self._lock:
            return frozenset(self._parents)

    def count(self, tier: int = GPU) -> int:
        """Return how many blocks can be reused from a tier."""
        with self._lock:
            if tier == GPU:
                return len(self._parents) - len(self._slow)
            return sum(1 for slow in self._slow.values() if slow == tier)

    def _publish(self, events: tuple[KvEvent, ...]) -> None:
        if not events:
            return
        with self._lock:
            for event in events:
                self._apply(event)
            self._sequence += 1
            batch = KvEventBatch(self._sequence, events)
            for reader in self._readers:
                reader.push(batch, self._max_lag)

    def _apply(self, event: KvEvent) -> None:
        if isinstance(event, KvSnapshot):
            self._parents, self._slow = {}, {}  # only ever an empty one
        elif isinstance(event, KvStored):
            parent = event.parent
            for block_hash in event.block_hashes:
                self._parents[block_hash] = parent
                parent = block_hash
                if event.tier != GPU:
                    self._slow[block_hash] = event.tier
                elif self._slow:
                    self._slow.pop(block_hash, None)
        else:
            for block_hash in event.block_hashes:
                self._parents.pop(block_hash, None)
                self._slow.pop(block_hash, None)

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
        tiers = tuple(self._slow.get(block_hash, GPU) for block_hash in self._parents) if self._slow else ()
        snapshot = KvSnapshot(tuple(self._parents), tuple(self._parents.values()), tiers)
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
