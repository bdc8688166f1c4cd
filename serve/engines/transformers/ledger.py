"""The library's own record of its KV blocks, read and changed in one way for both of its layouts.

Everything here is private to the library, which changed it between 5.17 (`BlockManager`) and 5.23 (`CacheAllocator`);
`open_ledger` refuses a layout it does not know. Nothing else in the package touches these attributes.

What we do differently from the library, and why. All of it can go once upstream does the same.

- Keys. 5.17 keys a block by Python's `hash` of its tokens, 5.23 by 64 bits of unkeyed BLAKE2b: a client can construct
  two prompts that collide and read from another's cache, and neither knows salts. Keys come from `BlockChain` instead.
- Registration. Both forget the blocks that a sequence's last step completed, because it is already finished by then:
  a prompt with one token of output is never cached. Here they are registered while the sequence has its blocks.
- Eviction. 5.17 evicts the block that was used last. 5.23 evicts all cached blocks at once when an active sequence
  lacks one, and none for a waiting sequence, which starves beside active ones. Here it is the least recently used
  block, one by one, and of a sequence the last first, so that what stays can be reached from its beginning.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from serve.errors import ConfigError


class WatchedBlocks(dict[bytes, int]):
    """The library's table from key to block, that notes every change in order.

    Attributes:
        changes: (key, whether it is there now), oldest first, since the list was last cleared by its reader.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[bytes, bool]] = []

    def __setitem__(self, key: bytes, block: int) -> None:
        super().__setitem__(key, block)
        self.changes.append((key, True))

    def pop(self, key: bytes, *default: Any) -> Any:
        if key in self:
            self.changes.append((key, False))
        return super().pop(key, *default)

    def clear(self) -> None:
        self.changes.extend((key, False) for key in self)
        super().clear()


class LeastRecentlyUsed(OrderedDict[int, None]):
    """Blocks whose last user is gone, oldest first; `popitem` takes the oldest, which 5.17 relies on."""

    def popitem(self, last: bool = False) -> tuple[int, None]:
        return super().popitem(last=last)


class Ledger(Protocol):
    """KV blocks of one cache. Only for the thread that steps the engine.

    Attributes:
        shared: Every block that can be reused now, by its key.
    """

    shared: WatchedBlocks

    @property
    def total_blocks(self) -> int:
        """All blocks there are."""

    def free_and_cached(self) -> tuple[int, int]:
        """Return how many blocks nobody uses: without content, and with content kept for reuse."""

    def num_cached(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks nobody uses."""

    def blocks_of(self, sequence: str) -> list[int]:
        """Return the blocks a sequence holds, in order; empty if it has none."""

    def share(self, sequence: str, blocks: Sequence[int]) -> None:
        """Let a sequence that has none begin with these blocks."""

    def register(self, sequence: str, index: int, key: bytes) -> None:
        """Make the sequence's block at `index` reusable; if another block has the key, use that one instead."""

    def forget_cached(self) -> None:
        """Drop the content of all blocks that nobody uses."""


def open_ledger(cache: Any) -> Ledger:
    """Take over the block accounting of a `PagedAttentionCache` that is empty.

    Raises:
        ConfigError: The layout is unknown.
    """
    try:
        return _AllocatorLedger(cache) if hasattr(cache, "cache_allocators") else _ManagerLedger(cache)
    except AttributeError as exc:
        raise ConfigError(
            f"this release of transformers keeps its KV blocks in a way that is not supported ({exc}); "
            "install transformers>=5.17,<5.24"
        ) from exc


class _ManagerLedger:
    """`BlockManager` of 5.17."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._manager = cache._block_manager
        self._tables: list[dict[str, list[int]]] = [group.block_table for group in cache.group_cache_managers]
        self.shared = WatchedBlocks()
        self._unused = LeastRecentlyUsed()
        _replace(self._manager, "_hash_to_id", self.shared)
        _replace(self._manager, "_init_block_ids", self._unused)
        # Never written blocks are read, and masked, by batched attention: garbage may be NaN, which no mask removes.
        for tensor in (*cache.key_cache, *cache.value_cache):
            tensor.zero_()
        free_blocks = cache.free_blocks

        def free_last_block_first(request_id: str) -> None:
            for table in self._tables:
                table.get(request_id, []).reverse()
            free_blocks(request_id)

        cache.free_blocks = free_last_block_first

    @property
    def total_blocks(self) -> int:
        return int(self._cache.num_blocks)

    def free_and_cached(self) -> tuple[int, int]:
        return int(self._manager.num_free_blocks) - len(self._unused), len(self._unused)

    def num_cached(self, blocks: Sequence[int]) -> int:
        return sum(block in self._unused for block in blocks)

    def blocks_of(self, sequence: str) -> list[int]:
        return self._tables[0].get(sequence, [])

    def share(self, sequence: str, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._manager.increase_ref_count(block)
        self._tables[0][sequence] = list(blocks)

    def register(self, sequence: str, index: int, key: bytes) -> None:
        table = self._tables[0][sequence]
        block = self._manager._id_to_block[table[index]]
        if block.is_complete:
            return
        existing = self.shared.get(key)
        if existing is None:
            block.hash = key
            self.shared[key] = block.id
            return
        self._manager.increase_ref_count(existing)
        self._manager.uninitialize_unshared_block(block.id)
        table[index] = existing

    def forget_cached(self) -> None:
        missing = len(self._manager._uninit_block_ids) + len(self._unused)
        self._manager.has_enough_free_blocks(missing)


class _AllocatorLedger:
    """`CacheAllocator` and `BlockLedger` of 5.23."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        # With several kinds of attention the library shares no blocks, and the first allocator stands for all.
        self._allocator = next(iter(cache.cache_allocators.values()))
        self._ledger = self._allocator.ledger
        self.shared = WatchedBlocks()
        self._unused = LeastRecentlyUsed()
        _replace(self._ledger, "hash_to_block", self.shared)
        _replace(self._ledger, "cached_blocks", self._unused)
        free_blocks, can_store = cache.free_blocks, cache.can_store_request_tokens

        def free_last_block_first(request_id: str, no_cache: bool = False) -> None:
            for allocator in cache.cache_allocators.values():
                allocator.block_table.get(request_id, []).reverse()
            free_blocks(request_id, no_cache)

        def evict_what_is_missing(state: Any, request_len: int, dry_run: bool = False) -> bool:
            if can_store(state, request_len, dry_run):
                return True
            if dry_run or not self._evict_for(state, request_len):
                return False
            return bool(can_store(state, request_len))

        cache.free_blocks = free_last_block_first
        cache.can_store_request_tokens = evict_what_is_missing

    @property
    def total_blocks(self) -> int:
        return int(self._cache.num_blocks)

    def free_and_cached(self) -> tuple[int, int]:
        if len(self._cache.cache_allocators) > 1:
            return int(self._cache.compute_free_capacity() * self.total_blocks), 0
        return self._num_free(), len(self._unused)

    def num_cached(self, blocks: Sequence[int]) -> int:
        return sum(block in self._unused for block in blocks)

    def blocks_of(self, sequence: str) -> list[int]:
        table: list[int] = self._allocator.block_table.get(sequence, [])
        return table

    def share(self, sequence: str, blocks: Sequence[int]) -> None:
        tokens = len(blocks) * self._allocator.tokens_per_page
        self._allocator.acquire_prefix_blocks(sequence, tokens, list(blocks))

    def register(self, sequence: str, index: int, key: bytes) -> None:
        table = self.blocks_of(sequence)
        block = table[index]
        if block in self._ledger.block_to_hash:
            return
        existing = self._ledger.register_new_hash(block, key)
        if existing is not None:
            self._ledger.acquire(existing)
            table[index] = existing
            self._release(block)

    def forget_cached(self) -> None:
        self._evict(len(self._unused))

    def _release(self, block: int) -> None:
        if self._ledger.release(block):
            self._cache.pool.free_blocks(self._allocator.index, [block])

    def _num_free(self) -> int:
        pool, allocator = self._cache.pool, self._allocator
        return int(pool.num_free_sectors * allocator.blocks_per_sector + pool.count_free_blocks(allocator.index))

    def _evict_for(self, state: Any, request_len: int) -> bool:
        needed = self._allocator.needs_new_blocks(state.request_id, state.current_len(), request_len)
        missing = needed - self._num_free()
        if not 0 < missing <= len(self._unused):
            return False
        self._evict(missing)
        return True

    def _evict(self, count: int) -> None:
        evicted = [self._unused.popitem()[0] for _ in range(count)]
        for block in evicted:
            self.shared.pop(self._ledger.block_to_hash.pop(block))
        self._cache.pool.free_blocks(self._allocator.index, evicted)


def _replace(owner: Any, name: str, container: Any) -> None:
    """Put our container where the library has an empty one of its own."""
    if getattr(owner, name):
        raise ConfigError(f"internal: the library's `{name}` is in use already")
    setattr(owner, name, container)
