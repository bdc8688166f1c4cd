"""KvContent: what is in one KV cache, kept so that a copy of all of it is a matter of milliseconds."""

from array import array
from typing import NamedTuple

from serve.core.kv_events import GPU, KvEvent, KvRemoved, KvSnapshot, KvStored


class PackedContent(NamedTuple):
    """The blocks of a cache at one moment.

    Attributes:
        hashes, parents: 64-bit integers of this machine's byte order, one a block.
        tiers: One byte a block; empty if all are on the GPU.
    """

    hashes: bytes
    parents: bytes
    tiers: bytes

    def __len__(self) -> int:
        return len(self.hashes) // 8


class KvContent:
    """Follows KV events. Blocks lie in arrays, without gaps: the last one moves to where one is removed."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._hashes = array("Q")
        self._parents = array("Q")
        self._tiers = bytearray()
        self._num_slow = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._places

    def apply(self, event: KvEvent) -> None:
        """Note a change."""
        if isinstance(event, KvStored):
            parent = event.parent
            for block_hash in event.block_hashes:
                self._store(block_hash, parent, event.tier)
                parent = block_hash
        elif isinstance(event, KvRemoved):
            for block_hash in event.block_hashes:
                self._remove(block_hash)
        else:
            self._replace(event)

    def pack(self) -> PackedContent:
        """Copy all of it."""
        tiers = bytes(self._tiers) if self._num_slow else b""
        return PackedContent(self._hashes.tobytes(), self._parents.tobytes(), tiers)

    def _store(self, block_hash: int, parent: int, tier: int) -> None:
        place = self._places.get(block_hash)
        if place is None:
            self._places[block_hash] = len(self._hashes)
            self._hashes.append(block_hash)
            self._parents.append(parent)
            self._tiers.append(tier)
            self._num_slow += tier != GPU
        else:
            self._parents[place] = parent
            self._num_slow += (tier != GPU) - (self._tiers[place] != GPU)
            self._tiers[place] = tier

    def _remove(self, block_hash: int) -> None:
        place = self._places.pop(block_hash, None)
        if place is None:
            return
        moved, parent, tier = self._hashes.pop(), self._parents.pop(), self._tiers.pop()
        removed_tier = tier
        if moved != block_hash:
            removed_tier = self._tiers[place]
            self._hashes[place], self._parents[place], self._tiers[place] = moved, parent, tier
            self._places[moved] = place
        self._num_slow -= removed_tier != GPU

    def _replace(self, snapshot: KvSnapshot) -> None:
        self._places = {block_hash: place for place, block_hash in enumerate(snapshot.block_hashes)}
        self._hashes = array("Q", snapshot.block_hashes)
        self._parents = array("Q", snapshot.parents)
        self._tiers = bytearray(snapshot.tiers) if snapshot.tiers else bytearray(len(self._hashes))
        self._num_slow = len(self._tiers) - self._tiers.count(GPU)
