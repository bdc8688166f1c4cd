"""PURE: the hash that TensorRT-LLM 1.2.x gives a KV block (its "v1 block key"), computed outside.

With it the adapter tells whose chain a stored block begins: the hash of a chain's first block also covers the cache
salt, which the events of 1.2.x do not carry.

Source: TensorRT-LLM's KV-aware router, which computes it too (tensorrt_llm/runtime/kv_cache_hash.py, late 2026).
Checked against no real engine yet; where it is wrong, chains are told apart by who was in flight (`chain_seeds.py`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_C1, _C2, _GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B9
_M32 = np.uint32(0x45D9F3B)


def block_key(
    token_ids: Sequence[int] | npt.NDArray[np.uint32],
    parent: int = 0,
    salt_id: int | None = None,
    lora_id: int | None = None,
) -> int:
    """Return the v1 hash of one block.

    Args:
        token_ids: Of this block; a partial block has a hash of its own.
        parent: Hash of the block before; 0 if there is none.
        salt_id: See `salt_id`; counts for a first block only.
        lora_id: The integer id of a LoRA adapter.
    """
    seed = len(token_ids) ^ (parent * _C1 & _MASK)
    if parent == 0 and salt_id is not None:
        seed = _mix64(salt_id, seed)
    for value in _mixed_tokens(token_ids):
        seed ^= (value + (seed << 6) + (seed >> 2)) & _MASK
    return seed if lora_id is None else _mix64(lora_id, seed)


def block_keys(
    token_ids: Sequence[int] | npt.NDArray[np.uint32], tokens_per_block: int, salt_id: int | None = None
) -> list[int]:
    """Return the v1 hashes of a sequence's blocks, as the runtime cuts it: without the last token; partial one last."""
    usable = np.asarray(token_ids, dtype=np.uint32)[:-1]
    keys: list[int] = []
    for start in range(0, len(usable), tokens_per_block):
        parent = keys[-1] if keys else 0
        keys.append(block_key(usable[start : start + tokens_per_block], parent, salt_id))
    return keys


def salt_id_of(digest: bytes) -> int:
    """Return the id that 1.2.x mixes into the first block: of the salt's BLAKE3 digest, the first 8 bytes."""
    return int.from_bytes(digest[:8], "little")


def _mixed_tokens(token_ids: Sequence[int] | npt.NDArray[np.uint32]) -> list[int]:
    values = np.array(token_ids, dtype=np.uint32)
    for _ in range(2):
        values = ((values >> np.uint32(16)) ^ values) * _M32
    values = (values >> np.uint32(16)) ^ values
    mixed: list[int] = (values + np.uint32(_GOLDEN)).tolist()
    return mixed


def _mix64(value: int, seed: int) -> int:
    value = (value ^ (value >> 30)) * _C1 & _MASK
    value = (value ^ (value >> 27)) * _C2 & _MASK
    value ^= value >> 31
    return seed ^ ((value + _GOLDEN + (seed << 6) + (seed >> 2)) & _MASK)
