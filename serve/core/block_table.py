"""BlockTable: hashes of KV blocks -> slots, small numbers that index columns of what is known of each block.

A hash table of arrays instead of objects: about 50 bytes a block instead of more than 100, looked up by the thousand at
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
_FIRST_BUCKETS = 1 << 15
_BUCKETS_PER_BLOCK = 4  # at least; then fewer than one block in eight is not the first of its bucket
_LEAST_SPLIT = 1024
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
        self._last_mask = (1 << (_BUCKETS_PER_BLOCK * capacity - 1).bit_length()) - 1
        # The low bits of a hash are its bucket: those of `_mask`, or of `_wider` if the bucket by `_mask` is one of the
        # first `_split`. Growing splits one bucket after the other, and then `_mask` is `_wider`.
        #
        # Source: W. Litwin, "Linear hashing: a new tool for file and table addressing", VLDB 1980.
        self._mask = self._wider = min(_FIRST_BUCKETS - 1, self._last_mask)
        self._split = 0
        self._choose_limit()
        # Each bucket is a list: `_heads` has its first slot, `_next` the one after each slot, 0 ends it.
        self._heads, self._head_at = make_int32(self._last_mask + 1)
        self._hashes, self._hash_at = make_uint64(capacity + 1)
        self._hash_at[0] = _NO_HASH
        self._next, self._next_at = make_int32(capacity + 1)
        self._free, self._free_at = make_int32(capacity + 1)
        self._num_free = 0

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
        hashes, bucket = self._hash_at, block_hash & self._mask
        slot = self._head_at[bucket if bucket >= self._split else block_hash & self._wider]
        while slot and hashes[slot] != block_hash:
            slot = self._next_at[slot]
        return slot

    def enter_one(self, block_hash: int) -> int:
        """Return the slot of a hash, after it was entered if it is not there; there must be room."""
        if self.count >= self._limit:
            self._grow(1)
        hashes, bucket = self._hash_at, block_hash & self._mask
        if bucket < self._split:
            bucket = block_hash & self._wider
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
        if self.count + len(hashes) > self._limit:
            self._grow(len(hashes))
        heads, following, known, free = self._head_at, self._next_at, self._hash_at, self._free_at
        mask, wider, split = self._mask, self._wider, self._split
        num_free, top, before = self._num_free, self.top, self._num_free - self.top
        slots = []
        for block_hash in hashes:
            bucket = block_hash & mask
            if bucket < split:
                bucket = block_hash & wider
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
        if self.count + len(hashes) > self._limit:
            self._grow(len(hashes))
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
        bucket = self._bucket(self._hash_at[slot])
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
        buckets = (hashes & self._mask_array).view(np.int64)
        if self._split:
            wider = (hashes & self._wider_array).view(np.int64)
            buckets = np.where(buckets < self._split, wider, buckets)
        return buckets

    def _bucket(self, block_hash: int) -> int:
        bucket = block_hash & self._mask
        return bucket if bucket >= self._split else block_hash & self._wider

    def _grow(self, blocks: int) -> None:
        """Split the next buckets: more than some new blocks need."""
        if self._mask == self._wider:
            self._wider = 2 * self._mask + 1
            self._wider_array = np.array(self._wider, dtype=np.uint64)
        end = self._split + max(_LEAST_SPLIT, 2 * _BUCKETS_PER_BLOCK * blocks)
        part = self._heads[self._split : min(end, self._mask + 1)]
        slots = self._listed(part)
        part[:] = 0
        self._split += len(part)
        self._link(slots, self._buckets(self._hashes[slots]))
        if self._split > self._mask:
            self._mask, self._split = self._wider, 0
            self._choose_limit()

    def _choose_limit(self) -> None:
        """Note up to how many blocks the buckets are enough."""
        self._limit = self._last_mask if self._mask == self._last_mask else (self._mask + 1) // _BUCKETS_PER_BLOCK
        self._mask_array = np.array(self._mask, dtype=np.uint64)

    def _listed(self, heads: npt.NDArray[np.int32]) -> Slots:
        """Return all slots of some buckets."""
        found = []
        slots = heads[heads != 0]
        while len(slots):
            found.append(slots)
            slots = self._next[slots]
            slots = slots[slots != 0]
        return np.concatenate(found).astype(np.intp) if found else np.empty(0, dtype=np.intp)


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
