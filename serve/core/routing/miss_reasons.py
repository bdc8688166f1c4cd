"""MissHistory: why the replica that a prompt was sent to does not hold all of it.

A hit rate alone says that something is lost, not what to do. More cache helps against `evicted`, more replicas or
another policy against `replica_busy`, one prompt template for all against `diverged`; nothing against `never_seen`.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serve.core.blocks import Hashes
from serve.core.kv_events import KvEvent, KvSnapshot, KvStored

_FOLLOWED = np.uint64(0x9FB21C651E98DF25)  # makes of a block's hash the key of "another block came after it"
_FLUSH_AT = 4096


class MissReason(StrEnum):
    """Why a block has to be computed."""

    REPLICA_BUSY = "replica_busy"  # another replica holds it: the load decided
    EVICTED = "evicted"  # some replica held it once, nobody does now
    SALT_DIFFERS = "salt_differs"  # its tokens were seen, under another cache salt
    LORA_DIFFERS = "lora_differs"  # its tokens were seen, under another LoRA adapter
    DIVERGED = "diverged"  # what came after the block before was something else, up to now
    NEVER_SEEN = "never_seen"  # new


class MissSpan(NamedTuple):
    """Consecutive blocks of a prompt that are missing for one reason.

    Attributes:
        first_block: Number of the first in the prompt, from 0.
        num_blocks: > 0.
    """

    reason: MissReason
    first_block: int
    num_blocks: int


class PromptBlocks(NamedTuple):
    """A prompt in blocks, without the one that holds its last token: that one is computed always.

    Attributes:
        hashes: (num_blocks,) chained to the seed of its salt and adapter.
        content: (num_blocks,) of the same tokens, chained to `ROOT`; not needed if there is neither salt nor adapter.
        cache_salt, lora: What the seed was made of.
    """

    hashes: Sequence[int] | Hashes
    content: Sequence[int] | Hashes = ()
    cache_salt: str = ""
    lora: str = ""


class MissHistory:
    """What the replicas of one model have held at some time, as far as it is remembered.

    Memory is bounded: tables of fixed size, in which a new entry takes the place of the one that is in its slot. What
    was forgotten counts as never seen. Because hashes are chained, one remembered block tells of all before it, so a
    prefix is forgotten only with all its blocks.

    Args:
        stored_slots: Blocks that were stored, and that were followed, at most. 8 bytes each.
        content_slots: Blocks of prompts with salt or adapter, at most. 16 bytes each.
    """

    def __init__(self, stored_slots: int = 1 << 21, content_slots: int = 1 << 18) -> None:
        self._stored = np.zeros(_power_of_two(stored_slots), dtype=np.uint64)
        self._content = np.zeros(_power_of_two(content_slots), dtype=np.uint64)
        self._salts, self._loras = (np.zeros(len(self._content), dtype=np.uint32) for _ in range(2))
        self._flush_at = min(_FLUSH_AT, len(self._stored) // 8)
        self._has_content = False
        self._new: list[int] = []
        self._new_parents: list[int] = []

    def apply(self, event: KvEvent) -> None:
        """Note what a replica stores."""
        if isinstance(event, KvStored):
            self._new += event.block_hashes
            self._new_parents.append(event.parent)
            self._new_parents += event.block_hashes[:-1]
        elif isinstance(event, KvSnapshot):
            self._new += event.block_hashes
            self._new_parents += event.parents
        if len(self._new) >= self._flush_at:
            self._flush()

    def sent(self, prompt: PromptBlocks) -> None:
        """Note the tokens of a prompt that goes to a replica; needed for those with a salt or an adapter only."""
        if not (prompt.cache_salt or prompt.lora):
            return
        self._has_content = True
        content = np.asarray(prompt.content, dtype=np.uint64)
        slots = _slots(content, self._content)
        self._content[slots] = content
        self._salts[slots] = _tag(prompt.cache_salt)
        self._loras[slots] = _tag(prompt.lora)

    def explain(self, prompt: PromptBlocks, hit_blocks: int, best_hit_blocks: int) -> tuple[MissSpan, ...]:
        """Return why blocks of a prompt have to be computed, in the order of the blocks. Ask before `sent`.

        Args:
            prompt: The prompt.
            hit_blocks: Leading blocks that the chosen replica holds.
            best_hit_blocks: The most that any replica holds.
        """
        total = len(prompt.hashes)
        held = min(total, max(hit_blocks, best_hit_blocks))
        if hit_blocks >= total:
            return ()
        rest = np.asarray(prompt.hashes[held:], dtype=np.uint64)
        known = held + self._depth(rest)
        by_salt, by_lora = self._seen_as_other(prompt, known)
        ends = (
            (MissReason.REPLICA_BUSY, held),
            (MissReason.EVICTED, known),
            (MissReason.SALT_DIFFERS, by_salt),
            (MissReason.LORA_DIFFERS, by_lora),
            (self._reason_of_new(prompt, max(known, by_salt, by_lora)), total),
        )
        spans, start = [], hit_blocks
        for reason, end in ends:
            if end > start:
                spans.append(MissSpan(reason, start, end - start))
                start = end
        return tuple(spans)

    def _depth(self, hashes: Hashes) -> int:
        """Return how many leading ones of a chain were stored at some time."""
        self._flush()
        return _last(self._stored[_slots(hashes, self._stored)] == hashes)

    def _seen_as_other(self, prompt: PromptBlocks, start: int) -> tuple[int, int]:
        """Return up to which block the tokens were seen under another salt, and under another adapter."""
        plain = not (prompt.cache_salt or prompt.lora)
        if plain and not self._has_content:  # as almost everywhere
            return 0, 0
        content = np.asarray((prompt.hashes if plain else prompt.content)[start:], dtype=np.uint64)
        if not len(content):
            return 0, 0
        slots = _slots(content, self._content)
        seen = self._content[slots] == content
        other_lora = seen & (self._loras[slots] != _tag(prompt.lora))
        other_salt = seen & ~other_lora & (self._salts[slots] != _tag(prompt.cache_salt))
        if not plain:  # what has neither salt nor adapter was told by events alone
            bare = self._stored[_slots(content, self._stored)] == content
            other_lora |= bare & bool(prompt.lora)
            other_salt |= bare & (not prompt.lora)
        return _end(start, other_salt), _end(start, other_lora)

    def _reason_of_new(self, prompt: PromptBlocks, start: int) -> MissReason:
        if not 0 < start < len(prompt.hashes):
            return MissReason.NEVER_SEEN
        key = np.asarray(prompt.hashes[start - 1 : start], dtype=np.uint64) ^ _FOLLOWED
        followed = self._stored[_slots(key, self._stored)] == key
        return MissReason.DIVERGED if followed[0] else MissReason.NEVER_SEEN

    def _flush(self) -> None:
        if not self._new:
            return
        parents = np.array(self._new_parents, dtype=np.uint64) ^ _FOLLOWED
        keys = np.concatenate((np.array(self._new, dtype=np.uint64), parents))
        self._stored[_slots(keys, self._stored)] = keys
        self._new, self._new_parents = [], []


def _slots(keys: Hashes, table: Hashes) -> npt.NDArray[np.intp]:
    return (keys & np.uint64(len(table) - 1)).astype(np.intp)


def _last(mask: npt.NDArray[np.bool_]) -> int:
    """Return one more than the number of the last one that is set; 0 if none is."""
    return len(mask) - int(mask[::-1].argmax()) if mask.any() else 0


def _end(start: int, mask: npt.NDArray[np.bool_]) -> int:
    return start + _last(mask) if mask.any() else 0


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@lru_cache(maxsize=4096)
def _tag(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
