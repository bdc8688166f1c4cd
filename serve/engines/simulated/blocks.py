"""BlockPool: paged KV memory with prefix reuse, counted by block hash.

A block is in one of three states: free, in use (by one or more sequences, if it has a hash; by exactly one, if its
content is not complete), or idle: nobody uses it, its content is kept for reuse until room is needed.

Two laws make this cheap. Sequences hold chains from their first block on, so whoever uses a block uses its parents; and
a chain is given back last block first. So a parent is never idle for longer than its children, the oldest idle block is
always a leaf (as TensorRT-LLM evicts), and what is held is closed under prefixes: hits can be found by bisection.
"""

from collections import OrderedDict
from collections.abc import Sequence as Chain

from serve.core.kv_events import KvRemoved, KvStored


class BlockPool:
    """KV blocks of one engine.

    Args:
        total_blocks: > 0.
    """

    def __init__(self, total_blocks: int) -> None:
        self.total_blocks = total_blocks
        self._users: dict[int, int] = {}  # block hash -> sequences that use it, >= 1
        self._idle: OrderedDict[int, None] = OrderedDict()  # block hash, the longest idle first
        self._open = 0  # blocks in use whose content is not complete, or not to be shared
        self._events: list[tuple[bool, list[int], int]] = []  # (stored?, hashes, parent), consecutive ones joined

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return len(self._users) + self._open

    @property
    def idle_blocks(self) -> int:
        """Blocks that nobody holds, kept for reuse."""
        return len(self._idle)

    @property
    def room_blocks(self) -> int:
        """Blocks that can be had: free ones, and idle ones by eviction."""
        return self.total_blocks - len(self._users) - self._open

    def content(self) -> frozenset[int]:
        """Return the hashes of all blocks that can be reused."""
        return frozenset(self._users) | frozenset(self._idle)

    def hit_blocks(self, hashes: Chain[int], limit: int) -> int:
        """Return how many leading blocks of a chain are held, `limit` at most."""
        users, idle = self._users, self._idle
        low, high = 0, min(limit, len(hashes))
        while low < high:
            middle = (low + high + 1) >> 1
            block_hash = hashes[middle - 1]
            if block_hash in users or block_hash in idle:
                low = middle
            else:
                high = middle - 1
        return low

    def in_use(self, hashes: Chain[int], count: int) -> int:
        """Return how many of the first `count` blocks of a chain, all of them held, are in use."""
        users = self._users
        low, high = 0, count  # users hold chains: those in use come first
        while low < high:
            middle = (low + high + 1) >> 1
            if hashes[middle - 1] in users:
                low = middle
            else:
                high = middle - 1
        return low

    def use(self, hashes: Chain[int], count: int) -> None:
        """Take part in the first `count` blocks of a chain, all of them held."""
        users, idle = self._users, self._idle
        for block_hash in hashes[:count]:
            if block_hash in users:
                users[block_hash] += 1
            else:
                del idle[block_hash]
                users[block_hash] = 1

    def open(self, count: int) -> None:
        """Take `count` blocks to be filled, evicting the longest idle.

        Raises:
            MemoryError: There are not so many: whoever admits sequences has miscounted.
        """
        if count > self.room_blocks:
            raise MemoryError(f"{count} KV blocks wanted, {self.room_blocks} can be had")
        self._open += count
        excess = self.used_blocks + len(self._idle) - self.total_blocks
        if excess > 0:
            self._evict(excess)

    def _evict(self, count: int) -> None:
        idle = self._idle
        removed = [idle.popitem(last=False)[0] for _ in range(count)]
        if self._events and not self._events[-1][0]:
            self._events[-1][1].extend(removed)
        else:
            self._events.append((False, removed, 0))

    def fill(self, hashes: Chain[int], parent: int) -> int:
        """Make a sequence's next open blocks reusable: they are complete, and known by these hashes from now on.

        Where another sequence has filled the same block meanwhile, that one is used and the own one is freed.

        Args:
            hashes: Chain of the blocks that are complete.
            parent: Hash of the block before, which the sequence uses; or the seed of the chain.

        Returns:
            How many blocks became available because another sequence had filled the same.
        """
        users, idle = self._users, self._idle
        self._open -= len(hashes)
        stored: list[int] = []
        freed = 0
        for block_hash in hashes:
            if block_hash in users:
                users[block_hash] += 1
                freed += 1
            elif block_hash in idle:
                del idle[block_hash]
                users[block_hash] = 1
            else:
                users[block_hash] = 1
                stored.append(block_hash)
        if stored:
            # New blocks are the end of the chain: what is held is closed under prefixes.
            known = len(hashes) - len(stored)
            self._record_stored(stored, hashes[known - 1] if known else parent)
        return freed

    def _record_stored(self, hashes: list[int], parent: int) -> None:
        if self._events:
            is_stored, last, _ = self._events[-1]
            if is_stored and last[-1] == parent:
                last.extend(hashes)
                return
        self._events.append((True, hashes, parent))

    def give_back(self, hashes: Chain[int], count: int, open_blocks: int) -> None:
        """Stop using the first `count` blocks of a chain, and `open_blocks` that were never filled."""
        users, idle = self._users, self._idle
        self._open -= open_blocks
        for block_hash in reversed(hashes[:count]):
            left = users[block_hash] - 1
            if left:
                users[block_hash] = left
            else:
                del users[block_hash]
                idle[block_hash] = None

    def take_events(self) -> list[KvStored | KvRemoved]:
        """Return what changed since the last call, in order."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return [
            KvStored(tuple(hashes), parent) if is_stored else KvRemoved(tuple(hashes))
            for is_stored, hashes, parent in events
        ]
