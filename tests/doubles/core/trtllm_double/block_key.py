"""Hashes of KV blocks, and how a sequence is cut into blocks (reference 2.8, word by word; plain integers)."""

import hashlib
from collections.abc import Iterable, Sequence

_MASK64, _MASK32 = (1 << 64) - 1, (1 << 32) - 1
_C, _C2, _G = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B9


def _mix32(value: int, seed: int) -> int:
    for _ in range(2):
        value = ((value >> 16) ^ value) * 0x45D9F3B & _MASK32
    value = (value >> 16) ^ value
    value = (value + _G) & _MASK32
    return seed ^ (value + (seed << 6) + (seed >> 2)) & _MASK64


def _mix64(value: int, seed: int) -> int:
    value = (value ^ value >> 30) * _C & _MASK64
    value = (value ^ value >> 27) * _C2 & _MASK64
    value ^= value >> 31
    return seed ^ (value + _G + (seed << 6) + (seed >> 2)) & _MASK64


def v1_hash(tokens: Sequence[int], parent: int = 0, salt_id: int | None = None, lora_id: int | None = None) -> int:
    """Return the v1 block key of one block, full or not; `parent` is 0 for the first one."""
    seed = len(tokens) ^ parent * _C & _MASK64
    if parent == 0 and salt_id is not None:
        seed = _mix64(salt_id, seed)
    for token in tokens:
        seed = _mix32(token, seed)
    return seed if lora_id is None else _mix64(lora_id, seed)


def salt_id(salt: str | None) -> int | None:
    """Return the number that a cache salt is hashed as: the first 8 bytes of its BLAKE3 digest, little endian.

    BLAKE3 is not in the standard library: without the package `blake3`, BLAKE2 stands in, and an outsider who predicts
    hashes from salts will disagree with the double, as with the newest line (reference 2.8).
    """
    if not salt:
        return None
    try:
        from blake3 import blake3
    except ImportError:
        digest = hashlib.blake2b(salt.encode(), digest_size=8).digest()
    else:
        digest = blake3(salt.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def cut(tokens: Sequence[int], tokens_per_block: int, *, partial: bool) -> Iterable[tuple[int, ...]]:
    """Cut a sequence into the token tuples of its blocks: the last token is never part of one."""
    end = len(tokens) - 1
    last = end if partial else end - end % tokens_per_block
    for start in range(0, last, tokens_per_block):
        yield tuple(tokens[start : min(start + tokens_per_block, last)])
