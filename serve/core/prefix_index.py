"""PrefixIndex: which replica holds which KV blocks, from KV events; answers how much of a prompt each one holds.

Nothing here goes through all blocks in Python: an event loop waits for it. A replica that leaves is forgotten some
blocks at a time, while it counts no more from the first moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.core.block_recency import BlockRecency
from serve.core.block_table import FEW, BlockTable, Hashes, Slots, make_int32
from serve.core.holder_sets import EMPTY, NOBODY, Counts, HolderSets
from serve.core.kv_events import GPU, KvEvent, KvRemoved, KvSnapshot, KvStored

_CHUNK = 4096  # blocks of one event that are handled together
_MATCH_FIRST = 512  # blocks of a prompt that are looked up first: most unknown prompts end here
_CLEAN_SETS = 512  # per event, while a replica is being forgotten
_CLEAN_SLOTS = 8192
_CLEAN_BLOCKS = 256
_TRUE = np.ones(1, dtype=bool)


@dataclass(frozen=True, slots=True)
class IndexMatch:
    """Leading blocks of a prompt that each row holds.

    Attributes:
        hit, host, disk: (num_rows,) blocks held at all; and those of them on a slower tier. Nobody writes to them.
        any_slow: Whether `host` or `disk` has any.
    """

    hit: Counts
    host: Counts
    disk: Counts
    any_slow: bool = False


class PrefixIndex:
    """KV blocks of the replicas of one model. A replica is a row: a small number, its own until it is removed.

    Args:
        max_blocks: Blocks that are remembered at most. Beyond, those that were least recently used are forgotten, ends
            of chains first; the index then knows less than the replicas hold, never more.
    """

    def __init__(self, max_blocks: int = 4_000_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"{max_blocks=} must be at least 1")
        self._max_blocks = max_blocks
        self._chunk = max(1, min(_CHUNK, max_blocks // 16))
        self._evict_blocks = max(1, min(256, max_blocks // _CHUNK))  # at once: to find one costs almost as much
        # Only beyond does it matter who was used last: until the cap is reached, that will be known of all in use.
        self._half = max_blocks // 2
        capacity = max_blocks + self._chunk  # an event is entered first, then what is too much is forgotten
        self._table = BlockTable(capacity)
        self._recency = BlockRecency(capacity)
        self._set, self._set_at = make_int32(capacity + 1)
        self._sets = HolderSets()
        self._swept = 0  # slots that were searched for blocks without holders
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._lanes: list[int] = []  # of each row
        self._lane_of_row = np.zeros(0, dtype=np.intp)  # the same
        self._nothing = np.zeros(0, dtype=np.int32)

    @property
    def num_rows(self) -> int:
        """Rows there are, in use or free."""
        return len(self._lanes)

    def __len__(self) -> int:
        """Return how many blocks are remembered, including some of replicas that were removed a moment ago."""
        return self._table.count

    # Membership

    def add(self, replica_id: str) -> int:
        """Make a replica known, holding nothing; return its row."""
        if replica_id in self._rows:
            raise ValueError(f"replica {replica_id!r} is in the index already; remove it first")
        if not self._free:
            self._free.append(len(self._lanes))
            self._lanes.append(NOBODY)
            self._nothing = np.zeros(len(self._lanes), dtype=np.int32)
        row = self._free.pop()
        self._rows[replica_id] = row
        self._let_have(row, self._sets.open_lane())
        return row

    def row(self, replica_id: str) -> int:
        """Return a replica's row."""
        return self._rows[replica_id]

    def remove(self, replica_id: str) -> None:
        """Forget a replica and all that it holds."""
        row = self._rows.pop(replica_id)
        self._sets.retire_lane(self._lanes[row])
        self._let_have(row, NOBODY)
        self._free.append(row)

    def _let_have(self, row: int, lane: int) -> None:
        self._lanes[row] = lane
        self._lane_of_row = np.array(self._lanes, dtype=np.intp)

    # Events

    def apply(self, row: int, event: KvEvent) -> None:
        """Note a change of what a replica holds."""
        lane, size = self._lanes[row], self._chunk
        if isinstance(event, KvStored):
            hashes = event.block_hashes
            if len(hashes) == 1:
                self._store_one(lane, hashes[0], event.parent, event.tier)
            else:
                self._store(lane, hashes[:size], event.parent, event.tier)
            for start in range(size, len(hashes), size):
                if not self._table.find_one(hashes[start - 1]):
                    break  # the cap bit in the middle of this chain: what follows is worth nothing without that
                self._store(lane, hashes[start : start + size], hashes[start - 1], event.tier)
        elif isinstance(event, KvRemoved):
            hashes = event.block_hashes
            if len(hashes) <= FEW:
                for block_hash in hashes:
                    self._remove_one(lane, block_hash)
            else:
                for start in range(0, len(hashes), size):
                    self._remove(lane, as_hashes(hashes[start : start + size]))
        else:
            self._start_afresh(row, event)
        if self._sets.needs_tidying:
            self._tidy()

    def _store_one(self, lane: int, block_hash: int, parent: int, tier: int) -> None:
        """Do the same as `_store`: most events are of one block, which a sequence has filled."""
        table = self._table
        slot = table.enter_one(block_hash)
        old = self._set_at[slot]
        new = self._sets.changed(old, lane, tier)
        if new != old:
            self._set_at[slot] = new
            self._sets.move(old, new, 1)
        self._recency.touch_one(slot, table.find_one(parent), table.count > self._half)
        if table.count > self._max_blocks:
            self._evict()

    def _store(self, lane: int, hashes: Sequence[int], parent: int, tier: int) -> None:
        slots = self._enter(hashes)
        self._recency.touch_chain(slots, self._table.find_one(parent), self._table.count > self._half)
        self._change_sets(slots, lane, tier)
        self._evict()

    def _remove(self, lane: int, hashes: Hashes) -> None:
        slots = np.unique(self._table.find(hashes))
        slots = slots[slots != 0]
        self._change_sets(slots, lane, None)
        for slot in slots[self._set[slots] == EMPTY].tolist():
            self._table.discard(slot)
            self._recency.forget(slot)

    def _remove_one(self, lane: int, block_hash: int) -> None:
        slot = self._table.find_one(block_hash)
        if slot:
            old = self._set_at[slot]
            new = self._sets.changed(old, lane, None)
            self._set_at[slot] = new
            self._sets.move(old, new, 1)
            if new == EMPTY:
                self._table.discard(slot)
                self._recency.forget(slot)

    def _start_afresh(self, row: int, snapshot: KvSnapshot) -> None:
        """Replace what a replica holds: its old lane is retired, which takes no time, and a new one is filled."""
        self._sets.retire_lane(self._lanes[row])
        lane = self._sets.open_lane()
        self._let_have(row, lane)
        hashes = snapshot.block_hashes
        # The last ones first: it is mostly parents that were stored first, and those are to be kept longest.
        for start in reversed(range(0, len(hashes), self._chunk)):
            part = slice(start, start + self._chunk)
            slots = np.asarray(self._enter(hashes[part]), dtype=np.intp)
            new = self._set[slots] == EMPTY
            if new.any():
                parents = as_hashes(snapshot.parents[part])
                self._recency.touch_new(slots[new], self._table.find(parents[new]))
            if snapshot.tiers:
                tiers = np.array(snapshot.tiers[part], dtype=np.int8)
                for tier in np.unique(tiers).tolist():
                    self._change_sets(slots[tiers == tier], lane, tier)
            else:
                self._change_sets(slots, lane, GPU)
            self._evict()

    def _enter(self, hashes: Sequence[int]) -> list[int] | Slots:
        return self._table.enter_few(hashes) if _are_few(hashes) else self._table.enter(as_hashes(hashes))

    def _change_sets(self, slots: list[int] | Slots, lane: int, tier: int | None) -> None:
        """Let blocks be held by a lane in a tier, or no more."""
        sets = self._sets
        if isinstance(slots, list):
            set_at, old, new, count = self._set_at, -1, -1, 0
            for slot in slots:
                its_set = set_at[slot]
                if its_set != old:
                    if count:
                        sets.move(old, new, count)
                    old, new, count = its_set, sets.changed(its_set, lane, tier), 0
                set_at[slot] = new
                count += 1
            if count:
                sets.move(old, new, count)
        elif len(slots):
            its_sets = self._set[slots]
            starts, ends = run_bounds(its_sets)
            changed = []
            for start, end in zip(starts, ends, strict=True):
                old = its_sets.item(start)
                changed.append(sets.changed(old, lane, tier))
                sets.move(old, changed[-1], end - start)
            self._set[slots] = changed[0] if len(changed) == 1 else np.repeat(changed, np.subtract(ends, starts))

    # Forgetting

    def _evict(self) -> None:
        while (excess := self._table.count - self._max_blocks) > 0:
            for slot in self._recency.oldest(max(excess, self._evict_blocks), self._table.top):
                self._discard(slot)

    def _tidy(self) -> None:
        """Go on forgetting replicas: first in the sets, then blocks that have no holder left."""
        sets = self._sets
        if not sets.is_clean:
            sets.clean(_CLEAN_SETS)
        if sets.deserted:
            first, end = self._swept + 1, min(self._swept + _CLEAN_SLOTS, self._table.top)
            deserted = np.isin(self._set[first : end + 1], list(sets.deserted))
            found = np.flatnonzero(deserted)[:_CLEAN_BLOCKS] + first
            for slot in found.tolist():
                self._discard(slot)
            if len(found) == _CLEAN_BLOCKS:
                end = int(found[-1])
            self._swept = end if end < self._table.top else 0

    def _discard(self, slot: int) -> None:
        self._sets.move(self._set_at[slot], EMPTY, 1)
        self._set_at[slot] = EMPTY
        self._table.discard(slot)
        self._recency.forget(slot)

    # Questions

    def match(self, hashes: Sequence[int] | Hashes) -> IndexMatch:
        """Return how many leading blocks each row holds. An array of hashes is faster than a list."""
        slots = self._find_leading(hashes if isinstance(hashes, np.ndarray) else as_hashes(hashes))
        if len(slots):
            its_sets = self._set[slots]
            starts, ends = run_bounds(its_sets)
            found = self._sets.count_leading([its_sets.item(start) for start in starts], ends)
            if found is not None:
                if self._table.count > self._half:
                    self._recency.touch(slots[: found.depth])
                lanes, none = self._lane_of_row, self._nothing
                host = none if found.host is None else found.host.take(lanes)
                disk = none if found.disk is None else found.disk.take(lanes)
                return IndexMatch(found.hit.take(lanes), host, disk, host is not none or disk is not none)
        return IndexMatch(self._nothing, self._nothing, self._nothing)

    def _find_leading(self, hashes: Hashes) -> Slots:
        if len(hashes) <= _MATCH_FIRST:
            return self._table.find_leading(hashes)
        first = self._table.find_leading(hashes[:_MATCH_FIRST])
        if len(first) < _MATCH_FIRST:
            return first
        return np.concatenate((first, self._table.find_leading(hashes[_MATCH_FIRST:])))


def as_hashes(hashes: Sequence[int]) -> Hashes:
    """Return hashes as an array."""
    return np.fromiter(hashes, np.uint64, len(hashes))


def run_bounds(numbers: npt.NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Return where runs of equal numbers begin and end; at least one number."""
    changes = (numbers[1:] != numbers[:-1]).nonzero()[0]
    if not len(changes):
        return [0], [len(numbers)]
    changes += 1
    starts: list[int] = changes.tolist()
    return [0, *starts], [*starts, len(numbers)]


def _are_few(hashes: Sequence[int]) -> bool:
    # Blocks that come twice in one event, which no engine says, are not for the fast way either.
    return len(hashes) <= FEW or len(set(hashes)) < len(hashes)
