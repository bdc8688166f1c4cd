"""BlockTable: hashes of KV blocks -> slots, small numbers that index columns of what is known of each block.

A hash table of arrays instead of objects: 16 to 80 bytes a block instead of more than 100, looked up by the thousand at
once without a cache miss for each object, and without the pause of half a second in which a `dict` of some millions of
entries moves to a larger place. Few blocks are handled one at a time, because a numpy call costs as much as two of
them.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.intp]

FEW = 96  # blocks up to which one at a time is faster
_FEW_WRONG = 48  # the same, of those that are not first in their bucket
# Buckets of the table: at first, and from some number of blocks on. Moving to a larger table is one pass over the
# blocks, so the last one, for which that would take too long, is made for as many as there may ever be.
_FIRST_BUCKETS = 1 << 17
_MIDDLE_BUCKETS = 1 << 21
_BUCKETS_PER_BLOCK = 4
_NO_HASH = 0x9E3779B97F4A7C15  # in slot 0; a block that had it would be found there, where nobody holds anything


class BlockTable:
    """Hashes, each with a slot in [1, capacity].

    Args:
        capacity: Blocks at most. Memory is taken as it is used.

    Attributes:
        count: Blocks there are.
        top: Highest slot that was ever used.
    """

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.top = 0
        self._capacity = capacity
        self._last_buckets = _power_of_two(_BUCKETS_PER_BLOCK * capacity)
        # Each bucket is a list: `_heads` has its first slot, `_next` the one after each slot, 0 ends it.
        self._hashes, self._hash_at = make_uint64(capacity + 1)
        self._hash_at[0] = _NO_HASH
        self._next, self._next_at = make_int32(capacity + 1)
        self._free, self._free_at = make_int32(capacity + 1)
        self._num_free = 0
        self._make_buckets(min(_FIRST_BUCKETS, self._last_buckets))

    def find(self, hashes: Hashes) -> Slots:
        """Return the slot of each; 0 for those that are not there."""
        slots = self._heads[self._buckets(hashes)].astype(np.intp)
        wrong = (self._hashes[slots] != hashes).nonzero()[0]
        while len(wrong):
            following = self._next[slots[wrong]]
            slots[wrong] = following
            wrong = wrong[(self._hashes[following] != hashes[wrong]) & (following != 0)]
        return slots

    def find_leading(self, hashes: Hashes) -> Slots:
        """Return the slots of those before the first one that is not there."""
        slots = self._heads[self._buckets(hashes)].astype(np.intp)
        wrong = (self._hashes[slots] != hashes).nonzero()[0]
        known, following = self._hash_at, self._next_at
        for at in wrong[:_FEW_WRONG].tolist():
            block_hash, slot = hashes.item(at), following[slots.item(at)]
            while slot and known[slot] != block_hash:
                slot = following[slot]
            if not slot:
                return slots[:at]
            slots[at] = slot
        if len(wrong) > _FEW_WRONG:
            first = int(wrong[_FEW_WRONG])
            slots[first:] = rest = self.find(hashes[first:])
            if not rest.all():
                return slots[: first + int(rest.argmin())]
        return slots

    def find_one(self, block_hash: int) -> int:
        """Return the slot of a hash; 0 if it is not there."""
        hashes, slot = self._hash_at, self._head_at[block_hash & self._mask]
        while slot and hashes[slot] != block_hash:
            slot = self._next_at[slot]
        return slot

    def enter_one(self, block_hash: int) -> int:
        """Return the slot of a hash, after it was entered if it is not there; there must be room."""
        self._provide(1)
        hashes, bucket = self._hash_at, block_hash & self._mask
        slot = first = self._head_at[bucket]
        while slot and hashes[slot] != block_hash:
            slot = self._next_at[slot]
        if not slot:
            if self._num_free:
                self._num_free -= 1
                slot = self._free_at[self._num_free]
            else:
                self.top += 1
                slot = self.top
            self.count += 1
            hashes[slot] = block_hash
            self._next_at[slot] = first
            self._head_at[bucket] = slot
        return slot

    def enter_few(self, hashes: Sequence[int]) -> list[int]:
        """Return the slot of each, after those that are not there were entered; there must be room for all."""
        self._provide(len(hashes))
        heads, following, known, free, mask = self._head_at, self._next_at, self._hash_at, self._free_at, self._mask
        num_free, top, before = self._num_free, self.top, self._num_free - self.top
        slots = []
        for block_hash in hashes:
            bucket = block_hash & mask
            slot = first = heads[bucket]
            while slot and known[slot] != block_hash:
                slot = following[slot]
            if not slot:
                if num_free:
                    num_free -= 1
                    slot = free[num_free]
                else:
                    top += 1
                    slot = top
                known[slot] = block_hash
                if first:
                    following[slot] = first
                heads[bucket] = slot
            slots.append(slot)
        self._num_free, self.top = num_free, top
        self.count += before - (num_free - top)
        return slots

    def enter(self, hashes: Hashes) -> Slots:
        """Return the slot of each, after those that are not there were entered; there must be room. No hash twice."""
        self._provide(len(hashes))
        slots = self.find(hashes)
        missing = (slots == 0).nonzero()[0]
        if len(missing) == len(slots):
            slots = self._take_slots(len(slots))
            self._hashes[slots] = hashes
            self._link(slots, self._buckets(hashes))
        elif len(missing):
            slots[missing] = new = self._take_slots(len(missing))
            self._hashes[new] = missing_hashes = hashes[missing]
            self._link(new, self._buckets(missing_hashes))
        return slots

    def discard(self, slot: int) -> None:
        """Forget a block; its slot will be another one's."""
        bucket = self._hash_at[slot] & self._mask
        other = self._head_at[bucket]
        if other == slot:
            self._head_at[bucket] = self._next_at[slot]
        else:
            while (following := self._next_at[other]) != slot:
                other = following
            self._next_at[other] = self._next_at[slot]
        self._next_at[slot] = 0  # as of one that was never used
        self._free_at[self._num_free] = slot
        self._num_free += 1
        self.count -= 1

    def _take_slots(self, count: int) -> Slots:
        again = min(count, self._num_free)
        new = np.arange(self.top + 1, self.top + 1 + count - again)
        self.top += count - again
        self.count += count
        if not again:
            return new
        self._num_free -= again
        return np.concatenate((self._free[self._num_free : self._num_free + again], new))

    def _link(self, slots: Slots, buckets: npt.NDArray[np.int64]) -> None:
        """Put slots at the heads of their buckets."""
        while True:
            self._next[slots] = self._heads[buckets]
            self._heads[buckets] = slots
            lost = (self._heads[buckets] != slots).nonzero()[0]  # of two in one bucket, the last one is there
            if not len(lost):
                break
            slots, buckets = slots[lost], buckets[lost]

    def _buckets(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes & self._mask_array).view(np.int64)

    def _provide(self, more: int) -> None:
        """Move to a larger table if the present one is too small for some more blocks."""
        if self.count + more <= self._enough:
            return
        buckets = self._mask + 1
        while buckets < self._last_buckets and buckets < _BUCKETS_PER_BLOCK * (self.count + more):
            buckets = self._last_buckets if buckets >= _MIDDLE_BUCKETS else min(_MIDDLE_BUCKETS, self._last_buckets)
        old = self._heads
        self._make_buckets(buckets)
        slots = self._chained(old)
        self._link(slots, self._buckets(self._hashes[slots]))

    def _chained(self, heads: npt.NDArray[np.int32]) -> Slots:
        """Return every slot that is in use."""
        found = []
        slots = heads[heads != 0]
        while len(slots):
            found.append(slots)
            slots = self._next[slots]
            slots = slots[slots != 0]
        return np.concatenate(found).astype(np.intp) if found else np.empty(0, dtype=np.intp)

    def _make_buckets(self, count: int) -> None:
        self._heads, self._head_at = make_int32(count)
        self._mask = count - 1
        self._enough = self._capacity if count == self._last_buckets else count // _BUCKETS_PER_BLOCK
        self._mask_array = np.array(self._mask, dtype=np.uint64)


# A column, and the same memory as a ctypes array: reading one element of that takes a third of what numpy needs. It is
# zero, and takes memory only where it was written.


def make_int32(length: int) -> tuple[npt.NDArray[np.int32], "ctypes.Array[ctypes.c_int32]"]:
    """Make a column of 32-bit integers."""
    column = np.zeros(length, dtype=np.int32)
    return column, (ctypes.c_int32 * length).from_buffer(column.data)


def make_int64(length: int) -> tuple[npt.NDArray[np.int64], "ctypes.Array[ctypes.c_int64]"]:
    """Make a column of 64-bit integers."""
    column = np.zeros(length, dtype=np.int64)
    return column, (ctypes.c_int64 * length).from_buffer(column.data)


def make_uint64(length: int) -> tuple[npt.NDArray[np.uint64], "ctypes.Array[ctypes.c_uint64]"]:
    """Make a column of unsigned 64-bit integers."""
    column = np.zeros(length, dtype=np.uint64)
    return column, (ctypes.c_uint64 * length).from_buffer(column.data)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
