"""EventTranslator: TensorRT-LLM's KV-cache events -> our KV events, with our block hashes and tiers.

PURE but for `ChainSeeds`. The engine names blocks by hashes of its own; a `stored` event carries the tokens, from which
ours follow. An event that was dropped is seen as a gap in the ids: nothing is known for sure then, and all is
forgotten. What comes later tells about the rest again: a block that was known before the gap is taken back when it
moves, or when another is stored behind it, as the engine keeps no block without those before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.core.blocks import block_hashes
from serve.core.kv_events import GPU, KvDraft, KvRemoved, KvStored
from serve.engines.trtllm.chain_seeds import ChainSeeds

Key = int | str  # the engine's hash of a block
Event = Mapping[str, Any]
_MAX_UNSURE = 1 << 19
_V1 = "v1_block_key"


@dataclass(frozen=True)
class Translation:
    """What some events of the engine mean.

    Attributes:
        events: Changes, in order.
        is_afresh: All that was known before is void.
    """

    events: tuple[KvStored | KvRemoved, ...] = ()
    is_afresh: bool = False


@dataclass
class EventCounts:
    """What was seen since the start.

    Attributes:
        gaps: How often events were missing.
        lost: How many, as far as the ids tell.
        unknown: Blocks that could not be published: their chain's beginning or salt is unknown.
        malformed: Events that could not be read.
    """

    gaps: int = 0
    lost: int = 0
    unknown: int = 0
    malformed: int = 0


@dataclass(frozen=True, slots=True)  # one for each block of the cache
class _Block:
    block_hash: int
    parent_hash: int
    parent: Key | None


@dataclass
class _Rank:
    """What one attention-DP rank holds; without attention DP there is one.

    Attributes:
        tiers: Of each block that is there.
        unsure: Blocks that were there before a gap; keys only.
        window: Largest attention window seen; blocks of smaller ones say nothing about a prefix.
        last_id: Of the last event.
    """

    tiers: dict[Key, int] = field(default_factory=dict)
    unsure: dict[Key, None] = field(default_factory=dict)
    window: int = 0
    last_id: int = -1


class EventTranslator:
    """Follows one engine's events, each of which it must be given once and in order.

    Args:
        tokens_per_block: Size of a KV block.
        seeds: Tells under which salt a chain was computed.
    """

    def __init__(self, tokens_per_block: int, seeds: ChainSeeds) -> None:
        self.counts = EventCounts()
        self.pool_blocks: tuple[int, ...] = ()  # blocks of each tier, of the largest window; () before it is told
        self._tokens_per_block = tokens_per_block
        self._seeds = seeds
        self._known: dict[Key, _Block] = {}
        self._ranks: dict[int, _Rank] = {}
        self._draft = KvDraft()
        self._is_afresh = False

    def translate(self, events: Iterable[Event]) -> Translation:
        """Return what the events of one read mean, together."""
        for event in events:
            try:
                self._take(event)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                self.counts.malformed += 1
                self._forget()
        translation = Translation(tuple(self._draft.finish()), self._is_afresh)
        self._is_afresh = False
        return translation

    def _take(self, event: Event) -> None:
        rank = self._ranks.setdefault(event.get("attention_dp_rank") or 0, _Rank())
        event_id, window, data = event["event_id"], event.get("window_size") or 0, event["data"]
        if event_id <= rank.last_id:
            if data["type"] != "created":
                return  # told before
            self._restart()
            rank = self._ranks.setdefault(event.get("attention_dp_rank") or 0, _Rank())
        elif event_id > rank.last_id + 1:
            self.counts.gaps += 1
            self.counts.lost += event_id - rank.last_id - 1
            self._forget()
        rank.last_id = event_id
        if window > rank.window:
            if rank.tiers:
                self._forget()
            rank.window, self.pool_blocks = window, ()
            rank.unsure.clear()
        if window == rank.window:
            self._apply(rank, data, event.get("hash_algo", _V1) == _V1)

    def _apply(self, rank: _Rank, data: Event, has_v1_keys: bool) -> None:
        kind = data["type"]
        if kind == "created":
            self.pool_blocks = self.pool_blocks or tuple(data["num_blocks_per_cache_level"])
        elif kind == "stored":
            self._store(rank, data["parent_hash"], data["blocks"], has_v1_keys)
        elif kind == "removed":
            for key in data["block_hashes"]:
                rank.unsure.pop(key, None)
                self._remove(rank, key)
        elif kind == "updated":
            level = data.get("cache_level")
            key = data["block_hash"]
            if isinstance(level, Mapping) and (key in rank.tiers or key in rank.unsure):
                self._put(rank, key, level["new_value"])

    def _store(self, rank: _Rank, parent: Key | None, blocks: Sequence[Event], has_v1_keys: bool) -> None:
        tokens = [[token["token_id"] for token in block["tokens"]] for block in blocks]
        partial = next((i for i, ids in enumerate(tokens) if len(ids) != self._tokens_per_block), len(tokens))
        whole = blocks[:partial]  # a partial block is reused by copying at best, and nothing follows it
        if not whole:
            return
        if parent is None:
            first = whole[0]["block_hash"]
            parent_hash = self._seeds.seed(tokens[0], first, has_v1_key=has_v1_keys, salt=_told_salt(whole[0]))
        else:
            known = self._known.get(parent)
            parent_hash = known.block_hash if known else None
            self._take_back(rank, parent)
        if parent_hash is None:
            self.counts.unknown += len(whole)
            return
        flat = np.array([token for ids in tokens[:partial] for token in ids], dtype=np.uint32)
        hashes: list[int] = block_hashes(flat, self._tokens_per_block, parent_hash).tolist()
        for block, block_hash in zip(whole, hashes, strict=True):
            key = block["block_hash"]
            self._known[key] = _Block(block_hash, parent_hash, parent)
            self._put(rank, key, block.get("cache_level") or GPU)
            parent, parent_hash = key, block_hash

    def _take_back(self, rank: _Rank, key: Key | None) -> None:
        """Believe again in a block of before a gap, and in those before it: one was stored behind them."""
        found = []
        while key is not None and key in rank.unsure:
            found.append(key)
            key = self._known[key].parent
        for known in reversed(found):
            self._put(rank, known, GPU)

    def _put(self, rank: _Rank, key: Key, tier: int) -> None:
        before = self._best_tier(key)
        rank.unsure.pop(key, None)
        rank.tiers[key] = tier
        after = self._best_tier(key)
        if after is not None and after != before:
            self._draft.store(self._known[key].block_hash, self._known[key].parent_hash, after)

    def _remove(self, rank: _Rank, key: Key) -> None:
        before = rank.tiers.pop(key, None)
        if before is not None:
            after = self._best_tier(key)
            if after is None:
                self._draft.remove(self._known[key].block_hash)
            elif after > before:
                self._draft.store(self._known[key].block_hash, self._known[key].parent_hash, after)
        if not any(key in other.tiers or key in other.unsure for other in self._ranks.values()):
            self._known.pop(key, None)

    def _best_tier(self, key: Key) -> int | None:
        return min((rank.tiers[key] for rank in self._ranks.values() if key in rank.tiers), default=None)

    def _forget(self) -> None:
        """Drop what is not sure any more; the meaning of hashes is kept."""
        for rank in self._ranks.values():
            rank.unsure = dict.fromkeys([*rank.unsure, *rank.tiers][-_MAX_UNSURE:])
            rank.tiers = {}
        wanted = {key for rank in self._ranks.values() for key in rank.unsure}
        self._known = {key: block for key, block in self._known.items() if key in wanted}
        self._draft = KvDraft()
        self._is_afresh = True

    def _restart(self) -> None:
        """Drop everything: another engine speaks."""
        self._forget()
        self._known, self._ranks, self.pool_blocks = {}, {}, ()


def _told_salt(block: Event) -> str | None:
    """Return the cache salt that a stored block carries, empty for none; None if it does not tell."""
    salt = block.get("cache_salt", ...) or ""
    return salt if isinstance(salt, str) else None
