"""Prompt tokens -> chained KV block hashes, `tokens_per_block` at a time.

One function for gateways and replicas: the hash of a block stands for its tokens and all tokens before it, so equal
hashes mean equal prefixes, whatever hash the engine itself uses. 64 bits and not cryptographic: a collision misroutes
a request, it never shares KV memory, which stays the engine's decision.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
# Finaliser constants of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
_M1, _M2, _GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
_M1_INVERSE, _M2_INVERSE = pow(_M1, -1, 1 << 64), pow(_M2, -1, 1 << 64)
_STEP = 0xD1342543DE82EF95  # multiplier of the chain; odd, so that it has an inverse modulo 2**64
_STEP_INVERSE = pow(_STEP, -1, 1 << 64)


def chain_seed(cache_salt: str = "", lora: str = "") -> int:
    """Return the parent hash of a sequence's first block; differs for each salt and LoRA adapter."""
    digest = hashlib.blake2b(f"{cache_salt}\0{lora}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


ROOT = chain_seed()


def block_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.uint32], tokens_per_block: int, parent: int = ROOT
) -> Hashes:
    """Hash each full block of `token_ids`, chained to `parent`. A last, partial block has no hash.

    Hashing a sequence at once, or piece by piece with `parent` the last hash of the piece before, is the same.

    Args:
        token_ids: (num_tokens,), each in [0, 2**32).
        tokens_per_block: > 0.
        parent: Hash of the block before the first one; `chain_seed(...)` if there is none.

    Returns:
        (num_tokens // tokens_per_block,) of uint64.
    """
    num_blocks = len(token_ids) // tokens_per_block
    if num_blocks == 0:
        return np.empty(0, dtype=np.uint64)
    tokens = np.asarray(token_ids[: num_blocks * tokens_per_block], dtype=np.uint64).reshape(num_blocks, -1)
    # A block's own hash: each token mixed with its position, then summed. Then the chain
    # c[i] = c[i-1] * STEP + own[i] has the closed form STEP**(i+1) * (c[-1] + sum_j own[j] * STEP**-(j+1)),
    # which is a cumulative sum. The finaliser is a bijection, so a chain can go on from a published hash.
    positions = np.arange(1, tokens_per_block + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    own = _mix(tokens + positions).sum(axis=1, dtype=np.uint64)
    powers = np.cumprod(np.full(num_blocks, _STEP, dtype=np.uint64))
    inverses = np.cumprod(np.full(num_blocks, _STEP_INVERSE, dtype=np.uint64))
    return _mix(powers * (np.uint64(_unmix(parent)) + np.cumsum(own * inverses, dtype=np.uint64)))


def _mix(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


def _unmix(x: int) -> int:
    x = _undo_xorshift(x, 31) * _M2_INVERSE & _MASK
    x = _undo_xorshift(x, 27) * _M1_INVERSE & _MASK
    return _undo_xorshift(x, 30)


def _undo_xorshift(x: int, shift: int) -> int:
    return x ^ (x >> shift) ^ (x >> 2 * shift)
