"""BlockPool: paged KV memory with prefix reuse, counted by block hash.

A block is in one of three states: free, in use (by one or more sequences, if it has a hash; by exactly one, if its
content is not complete), or idle: nobody uses it, its content is kept for reuse until room is needed.

Two laws make this cheap. Sequences hold chains from their first block on, so whoever uses a block uses its parents; and
a chain is given back last block first. So a parent is never idle for longer than its children, the block that has been
idle for longest is a leaf (as TensorRT-LLM evicts), users get fewer down a chain, and what is held is closed under
prefixes: where a chain ends, or ceases to be shared, is found by bisection, and the rest is moved as a whole.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Chain

from serve.core.kv_events import KvRemoved, KvStored

_SLACK = 1024  # stale entries of the eviction queue that are not worth a compaction


class BlockPool:
    """KV blocks of one engine.

    Args:
        total_blocks: > 0.

    Attributes:
        used_blocks: Blocks that sequences hold.
        idle_blocks: Blocks that nobody holds, kept for reuse.
    """

    def __init__(self, total_blocks: int) -> None:
        self.total_blocks = total_blocks
        self.used_blocks = 0
        self.idle_blocks = 0
        # Block hash -> how many sequences use it; or, idle, minus the number of the batch with which it became so.
        self._state: dict[int, int] = {}
        # Chains that became idle, the first at the left; entries whose state says otherwise by now are stale.
        self._queue: deque[tuple[int, list[int]]] = deque()
        self._queued = 0  # entries in it
        self._batch = 0
        self._events: list[tuple[bool, list[int], int]] = []  # (stored?, hashes, parent), consecutive ones joined

    @property
    def room_blocks(self) -> int:
        """Blocks that can be had: free ones, and idle ones by eviction."""
        return self.total_blocks - self.used_blocks

    def content(self) -> frozenset[int]:
        """Return the hashes of all blocks that can be reused."""
        return frozenset(self._state)

    def hit_blocks(self, hashes: Chain[int], limit: int) -> int:
        """Return how many leading blocks of a chain are held, `limit` at most."""
        state = self._state
        return _bisect(hashes, min(limit, len(hashes)), lambda block_hash: block_hash in state)

    def in_use(self, hashes: Chain[int], count: int) -> int:
        """Return how many of the first `count` blocks of a chain, all of them held, are in use."""
        state = self._state
        return _bisect(hashes, count, lambda block_hash: state[block_hash] > 0)

    def use(self, hashes: Chain[int], count: int) -> None:
        """Take part in the first `count` blocks of a chain, all of them held."""
        if not count:
            return
        shared = self.in_use(hashes, count)
        for block_hash in hashes[:shared]:
            self._state[block_hash] += 1
        self._state.update(dict.fromkeys(hashes[shared:count], 1))
        self.used_blocks += count - shared
        self.idle_blocks -= count - shared

    def open(self, count: int) -> None:
        """Take `count` blocks to be filled, evicting the longest idle.

        Raises:
            MemoryError: There are not so many: whoever admits sequences has miscounted.
        """
        if count > self.room_blocks:
            raise MemoryError(f"{count} KV blocks wanted, {self.room_blocks} can be had")
        self.used_blocks += count
        excess = self.used_blocks + self.idle_blocks - self.total_blocks
        if excess > 0:
            self._evict(excess)

    def fill(self, hashes: Chain[int], parent: int) -> int:
        """Make a sequence's next open blocks reusable: they are complete, and known by these hashes from now on.

        Where another sequence has filled the same block meanwhile, that one is used and the own one is freed.

        Args:
            hashes: Chain of the blocks that are complete.
            parent: Hash of the block before, which the sequence uses; or the seed of the chain.

        Returns:
            How many blocks became available because another sequence uses the same.
        """
        known = self.hit_blocks(hashes, len(hashes)) if hashes[0] in self._state else 0
        used_before = self.used_blocks
        if known:
            self.used_blocks -= known
            self.use(hashes, known)
        if known < len(hashes):
            stored = list(hashes[known:])
            self._state.update(dict.fromkeys(stored, 1))
            self._record_stored(stored, hashes[known - 1] if known else parent)
        return used_before - self.used_blocks

    def give_back(self, hashes: Chain[int], count: int, open_blocks: int) -> None:
        """Stop using the first `count` blocks of a chain, and `open_blocks` that were never filled."""
        state = self._state
        shared = _bisect(hashes, count, lambda block_hash: state[block_hash] > 1)
        for block_hash in hashes[:shared]:
            state[block_hash] -= 1
        self.used_blocks -= open_blocks + count - shared
        if shared < count:
            self._become_idle(list(hashes[shared:count]))

    def take_events(self) -> list[KvStored | KvRemoved]:
        """Return what changed since the last call, in order."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return [
            KvStored(tuple(hashes), parent) if is_stored else KvRemoved(tuple(hashes))
            for is_stored, hashes, parent in events
        ]

    def _record_stored(self, hashes: list[int], parent: int) -> None:
        if self._events:
            is_stored, last, _ = self._events[-1]
            if is_stored and last[-1] == parent:
                last.extend(hashes)
                return
        self._events.append((True, hashes, parent))

    def _become_idle(self, chain: list[int]) -> None:
        self._batch += 1
        self._state.update(dict.fromkeys(chain, -self._batch))
        self.idle_blocks += len(chain)
        self._queue.append((-self._batch, chain))
        self._queued += len(chain)
        if self._queued > 2 * self.idle_blocks + _SLACK:
            live = ((mark, [h for h in old if self._state.get(h) == mark]) for mark, old in self._queue)
            self._queue = deque((mark, old) for mark, old in live if old)
            self._queued = self.idle_blocks

    def _evict(self, count: int) -> None:
        state, queue, removed = self._state, self._queue, []
        self.idle_blocks -= count
        while count:
            mark, chain = queue[0]
            last = chain[: -count - 1 : -1]  # children before their parents
            del chain[-count:]
            self._queued -= len(last)
            if not chain:
                queue.popleft()
            evicted = [block_hash for block_hash in last if state.get(block_hash) == mark]
            for block_hash in evicted:
                del state[block_hash]
            removed += evicted
            count -= len(evicted)
        if self._events and not self._events[-1][0]:
            self._events[-1][1].extend(removed)
        else:
            self._events.append((False, removed, 0))


def _bisect(hashes: Chain[int], count: int, holds: Callable[[int], bool]) -> int:
    """Return how many of the first `count` blocks of a chain have a property that no block has without its parent."""
    if not count or not holds(hashes[0]):
        return 0
    if holds(hashes[count - 1]):
        return count
    low, high = 1, count - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if holds(hashes[middle - 1]):
            low = middle
        else:
            high = middle - 1
    return low
