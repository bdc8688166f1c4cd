"""BlockRecency: which blocks were used least recently, ancestors counting as used when their descendants are.

So a chain is forgotten from its end: a block without those before it is worth nothing.
"""

import math

import numpy as np

from serve.core.block_table import Slots, make_int32, make_int64

_NEVER = np.iinfo(np.int64).max  # of a slot that is free: not to be chosen
_SAMPLE = 16  # slots looked at for each one to be found
_LEAST_SAMPLE = 1024
_LAG = 64  # ancestors are touched again after this part of all blocks has been touched


class BlockRecency:
    """When each slot of a table was used last, by a clock that counts uses.

    Args:
        capacity: Highest slot.
    """

    def __init__(self, capacity: int) -> None:
        self._clock = 0
        self._lag = capacity // _LAG
        self._hand = 0
        self._used, self._used_at = make_int64(capacity + 1)
        # Slot of the block before each one. It may be outdated, if that block has gone and come back or its slot is
        # another's: then a stranger counts as used, which does no harm.
        self._parents, self._parent_at = make_int32(capacity + 1)

    def touch(self, slots: Slots) -> None:
        """Note that blocks were used: leading ones of a chain, in order."""
        self._clock += len(slots)
        self._used[slots] = np.arange(self._clock, self._clock - len(slots), -1)

    def touch_chain(self, slots: list[int] | Slots, parent: int, with_ancestors: bool) -> None:
        """Note that blocks were stored, each the parent of the next; `parent` is the first one's, 0 if unknown."""
        if isinstance(slots, list):
            used, parents = self._used_at, self._parent_at
            before, clock = parent, self._clock + len(slots)
            self._clock = clock
            for slot in slots:
                used[slot] = clock
                parents[slot] = before
                before = slot
                clock -= 1
        else:
            self.touch(slots)
            self._parents[slots[1:]] = slots[:-1]
            self._parent_at[int(slots[0])] = parent
        if with_ancestors:
            self._touch_ancestors(parent)

    def touch_one(self, slot: int, parent: int, with_ancestors: bool) -> None:
        """Note that a block was stored after `parent`."""
        self._clock += 1
        self._used_at[slot] = self._clock
        self._parent_at[slot] = parent
        if with_ancestors:
            self._touch_ancestors(parent)

    def touch_new(self, slots: Slots, parents: Slots) -> None:
        """Note that blocks have become known, with their parents; nothing says when they were used."""
        self.touch(slots)
        self._parents[slots] = parents

    def forget(self, slot: int) -> None:
        """Note that a slot is free."""
        self._used_at[slot] = _NEVER

    def oldest(self, count: int, top: int) -> list[int]:
        """Return up to `count` slots in [1, top], least recently used among a sample; all, if there are not many."""
        size = min(top, max(_LEAST_SAMPLE, _SAMPLE * count))
        stride = int(top * 0.6180339887) | 1
        while math.gcd(stride, top) != 1:
            stride += 2
        sample = (self._hand + stride * np.arange(size)) % top + 1
        self._hand = (self._hand + stride * size) % top
        used = self._used[sample]
        chosen = np.argpartition(used, count - 1)[:count] if count < size else np.arange(size)
        chosen = chosen[used[chosen] != _NEVER]
        return sample[chosen].tolist()  # type: ignore[no-any-return]

    def _touch_ancestors(self, slot: int) -> None:
        used = self._used_at
        recently = self._clock - self._lag
        while slot and used[slot] < recently:
            self._clock += 1
            used[slot] = self._clock
            slot = self._parent_at[slot]
