"""HolderSets: the different sets of replicas that hold a block; a block has the number of its set.

Blocks of one prompt are mostly held by the same replicas, so there are far fewer sets than blocks. A replica is a bit
of a mask, its lane. It leaves by losing its lane: at once that lane counts for nobody, then the sets are gone through,
some at a time, and when none has it any more, it is another replica's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve.core.kv_events import DISK, GPU, HOST

EMPTY = 0  # number of the set without holders
NOBODY = 0  # the lane that no replica has


Counts = npt.NDArray[np.int32]


class HolderSet(NamedTuple):
    """Replicas that hold a block, as masks of lanes.

    Attributes:
        held: Those that hold it at all.
        host, disk: Those of them that have it on a slower tier only.
    """

    held: int
    host: int = 0
    disk: int = 0


class LeadingBlocks(NamedTuple):
    """How many leading blocks of a chain are held.

    Attributes:
        depth: By anyone; > 0.
        hit: (num_lanes,) by each lane; 0 for those that are not live.
        host, disk: (num_lanes,) those of them that are on a slower tier; None if there are none.
    """

    depth: int
    hit: Counts
    host: Counts | None
    disk: Counts | None


class HolderSets:
    """Numbered sets, each there as long as some block has it.

    Attributes:
        sets: By number. May contain lanes that are not live.
        live: Mask of the lanes that are replicas.
        deserted: Numbers of sets that have become empty and that blocks still have.
    """

    def __init__(self) -> None:
        self.sets = [HolderSet(0)]
        self.live = 0
        self.deserted: set[int] = set()
        self._numbers = {self.sets[EMPTY]: EMPTY}
        self._blocks = [0]
        self._free: list[int] = []
        self._alone: dict[int, int] = {}  # number of the set of each live lane alone; it is never forgotten
        self._num_lanes = NOBODY + 1
        self._free_lanes: list[int] = []
        self._retired = 0
        self._cleaning = 0  # lanes that the present pass removes
        self._cleaned = 0  # sets it has been through

    def __len__(self) -> int:
        return len(self.sets) - len(self._free)

    # Lanes

    @property
    def num_lanes(self) -> int:
        """Lanes there are, in use or not."""
        return self._num_lanes

    @property
    def is_clean(self) -> bool:
        """Whether no set can have lanes that are not live."""
        return not (self._retired or self._cleaning)

    @property
    def needs_tidying(self) -> bool:
        """Whether some sets have lanes that are not live, or some blocks a set without any."""
        return bool(self._retired or self._cleaning or self.deserted)

    def open_lane(self) -> int:
        """Return a lane that no set has."""
        if not self._free_lanes and self._num_lanes > 64 + 2 * self.live.bit_count():
            while not self.is_clean:  # replicas come and go faster than they are forgotten
                self.clean(len(self.sets))
        if self._free_lanes:
            lane = self._free_lanes.pop()
        else:
            lane = self._num_lanes
            self._num_lanes += 1
        self.live |= 1 << lane
        self._alone[lane] = number = self._number(HolderSet(1 << lane))
        self._blocks[number] += 1
        return lane

    def retire_lane(self, lane: int) -> None:
        """Let a lane count no more."""
        self.live &= ~(1 << lane)
        self._retired |= 1 << lane
        self.move(self._alone.pop(lane), EMPTY, 1)

    def clean(self, count: int) -> None:
        """Remove retired lanes from the next `count` sets."""
        if not self._cleaning:
            self._cleaning, self._retired, self._cleaned = self._retired, 0, 1
        end = min(len(self.sets), self._cleaned + count)
        for number in range(self._cleaned, end):
            if self.sets[number].held & self._cleaning:
                self._clean_set(number)
        self._cleaned = end
        if end == len(self.sets):
            while self._cleaning:
                lane = self._cleaning.bit_length() - 1
                self._free_lanes.append(lane)
                self._cleaning ^= 1 << lane

    def _clean_set(self, number: int) -> None:
        old, keep = self.sets[number], ~self._cleaning
        if self._numbers.get(old) == number:
            del self._numbers[old]
        new = HolderSet(old.held & keep, old.host & keep, old.disk & keep)
        self.sets[number] = new
        self._numbers.setdefault(new, number)  # if there is such a set already, two numbers mean the same from now on
        if not new.held:
            self.deserted.add(number)

    # Sets

    def changed(self, number: int, lane: int, tier: int | None) -> int:
        """Return the set that a block of set `number` has once a replica has it in a tier; None: has it no more.

        A set is new as long as `move` has counted no block of it: it has to be called next.
        """
        alone = self._alone[lane]
        if number == EMPTY and tier == GPU:
            return alone
        if number == alone and tier is None:
            return EMPTY
        old, bit = self.sets[number], 1 << lane
        rest = self.live & ~bit
        held, host, disk = old.held & rest, old.host & rest, old.disk & rest
        if tier is not None:
            held |= bit
            if tier == HOST:
                host |= bit
            elif tier == DISK:
                disk |= bit
        return self._number(HolderSet(held, host, disk))

    def move(self, old: int, new: int, blocks: int) -> None:
        """Count blocks that go over from one set to another. A set that nobody has any more is forgotten."""
        if old == new:
            return
        if new != EMPTY:
            self._blocks[new] += blocks
        if old != EMPTY:
            self._blocks[old] -= blocks
            if not self._blocks[old]:
                self._forget(old)

    def count_leading(self, numbers: Sequence[int], ends: Sequence[int]) -> LeadingBlocks | None:
        """Return how many leading blocks of a chain each lane holds; None if nobody holds the first.

        Args:
            numbers: Sets of its blocks, as runs of equal ones, in order.
            ends: Number of blocks up to the end of each run.
        """
        live = self.live & self.sets[numbers[0]].held
        if not live:
            return None
        depth = 0
        lives, depths = [live], [0]  # masks of those that hold all so far; depths where they become fewer
        slower: list[tuple[int, int, int]] = []  # masks of host and disk, and length, of runs that have them
        for number, end in zip(numbers, ends, strict=True):
            held, host, disk = self.sets[number]
            still = live & held
            if still != live:
                depths.append(depth)
                live = still
                if not live:
                    break
                lives.append(live)
            if host or disk:
                slower.append((host & live, disk & live, end - depth))
            depth = end
        else:
            depths.append(depth)
        bits = self._unpack(lives)
        passed: npt.NDArray[np.integer] = np.add.reduce(bits, axis=0, dtype=np.intp) if len(lives) > 1 else bits[0]
        hit = np.array(depths, dtype=np.int32).take(passed)
        if not slower:
            return LeadingBlocks(depth, hit, None, None)
        hosts, disks, lengths = zip(*slower, strict=True)
        weights = np.array(lengths, dtype=np.int32)[:, None]
        host_counts, disk_counts = (
            (self._unpack(masks) * weights).sum(axis=0, dtype=np.int32) for masks in (hosts, disks)
        )
        return LeadingBlocks(depth, hit, host_counts, disk_counts)

    def _unpack(self, masks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return a mask's bits as a row of (len(masks), num_lanes)."""
        width = (self._num_lanes + 7) // 8
        packed = np.frombuffer(b"".join([mask.to_bytes(width, "little") for mask in masks]), dtype=np.uint8)
        return np.unpackbits(packed.reshape(-1, width), axis=1, count=self._num_lanes, bitorder="little")

    def _number(self, wanted: HolderSet) -> int:
        number = self._numbers.get(wanted)
        if number is None:
            if self._free:
                number = self._free.pop()
                self.sets[number] = wanted
            else:
                number = len(self.sets)
                self.sets.append(wanted)
                self._blocks.append(0)
            self._numbers[wanted] = number
        return number

    def _forget(self, number: int) -> None:
        old = self.sets[number]
        if self._numbers.get(old) == number:
            del self._numbers[old]
        self.sets[number] = HolderSet(0)
        self._free.append(number)
        self.deserted.discard(number)
