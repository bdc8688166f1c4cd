"""PrefixIndex: which replica holds which KV blocks, from KV events; answers how much of a prompt each one holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.core.kv_events import DISK, GPU, HOST, KvEvent, KvRemoved, KvSnapshot, KvStored

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class IndexMatch:
    """Leading blocks of a prompt that each row holds.

    Attributes:
        hit, host, disk: (num_rows,) blocks held at all; and those of them on a slower tier.
    """

    hit: Counts
    host: Counts
    disk: Counts


class PrefixIndex:
    """KV blocks of the replicas of one model. A replica is a row: a small number, its own until it is removed.

    Args:
        max_blocks: Blocks that are remembered at most.
    """

    def __init__(self, max_blocks: int = 4_000_000) -> None:
        self._max_blocks = max_blocks
        self._holders: dict[int, int] = {}
        self._tiers: dict[int, dict[int, int]] = {}
        self._rows: dict[str, int] = {}
        self._free: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows there are, in use or free."""
        return len(self._rows) + len(self._free)

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, replica_id: str) -> int:
        """Make a replica known, holding nothing; return its row."""
        row = self._free.pop() if self._free else len(self._rows)
        self._rows[replica_id] = row
        return row

    def row(self, replica_id: str) -> int:
        """Return a replica's row."""
        return self._rows[replica_id]

    def remove(self, replica_id: str) -> None:
        """Forget a replica and all that it holds."""
        row = self._rows.pop(replica_id)
        self._clear(row)
        self._free.append(row)

    def apply(self, row: int, event: KvEvent) -> None:
        """Note a change of what a replica holds."""
        bit = 1 << row
        holders = self._holders
        if isinstance(event, KvStored):
            for block in event.block_hashes:
                holders[block] = holders.get(block, 0) | bit
                self._set_tier(block, row, event.tier)
        elif isinstance(event, KvRemoved):
            for block in event.block_hashes:
                left = holders.get(block, 0) & ~bit
                if left:
                    holders[block] = left
                else:
                    holders.pop(block, None)
                self._set_tier(block, row, GPU)
        elif isinstance(event, KvSnapshot):
            self._clear(row)
            for number, block in enumerate(event.block_hashes):
                holders[block] = holders.get(block, 0) | bit
                self._set_tier(block, row, event.tiers[number] if event.tiers else GPU)

    def match(self, hashes: Sequence[int]) -> IndexMatch:
        """Return how many leading blocks each row holds."""
        rows = self.num_rows
        hit, host, disk = (np.zeros(rows, dtype=np.int32) for _ in range(3))
        live = (1 << rows) - 1
        depth = 0
        for block in hashes:
            still = live & self._holders.get(block, 0)
            if still != live:
                _assign(hit, live & ~still, depth)
                live = still
                if not live:
                    break
            depth += 1
            for row, tier in self._tiers.get(block, {}).items():
                if live >> row & 1:
                    (host if tier == HOST else disk)[row] += 1
        _assign(hit, live, depth)
        return IndexMatch(hit, host, disk)

    def _clear(self, row: int) -> None:
        bit = 1 << row
        for block, holders in list(self._holders.items()):
            if holders & bit:
                if holders == bit:
                    del self._holders[block]
                else:
                    self._holders[block] = holders & ~bit
                self._set_tier(block, row, GPU)

    def _set_tier(self, block: int, row: int, tier: int) -> None:
        if tier in (HOST, DISK):
            self._tiers.setdefault(block, {})[row] = tier
        elif block in self._tiers:
            self._tiers[block].pop(row, None)
            if not self._tiers[block]:
                del self._tiers[block]


def _assign(column: Counts, mask: int, value: int) -> None:
    while mask:
        low = mask & -mask
        column[low.bit_length() - 1] = value
        mask ^= low
