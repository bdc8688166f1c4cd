"""Prompt tokens -> chained KV block hashes, `tokens_per_block` at a time.

One function for gateways and replicas: the hash of a block stands for its tokens and all tokens before it, so equal
hashes mean equal prefixes, whatever hash the engine itself uses. 64 bits and not cryptographic: a collision misroutes
a request, it never shares KV memory, which stays the engine's decision.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_STEP = 0xD1342543DE82EF95  # multiplier of the chain; odd, so that it has an inverse modulo 2**64
_STEP_INVERSE = pow(_STEP, -1, 1 << 64)
# First multiplier of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
_MULTIPLIER = 0xBF58476D1CE4E5B9
_MULTIPLIER_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
# Arrays without dimensions, because numpy takes a third longer to combine an array with one of its scalars.
_FACTOR, _UPPER, _LOWER = (np.array(number, dtype=np.uint64) for number in (_MULTIPLIER, 32, 29))


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

    A block's own hash is multilinear: the sum of its tokens, each times the coefficient of its position, modulo 2**64;
    then mixed, so that sums of different blocks have no linear relation. For tokens below 2**32, two blocks that differ
    in one token, or by an exchange of two tokens, never collide (see `_coefficients`).

    Args:
        token_ids: (num_tokens,), each in [0, 2**32). An array of uint32 is fastest by far.
        tokens_per_block: > 0.
        parent: Hash of the block before the first one; `chain_seed(...)` if there is none.

    Returns:
        (num_tokens // tokens_per_block,) of uint64.

    Source: family MULTILINEAR of Lemire, Kaser, "Strongly universal string hashing is fast", The Computer Journal 57,
    2014: with random coefficients, two blocks whose tokens differ by d[i] collide with probability at most
    2**(k - 64), where 2**k is the highest power of two that divides every d[i].
    """
    num_blocks = len(token_ids) // tokens_per_block
    if num_blocks == 0:
        return np.empty(0, dtype=np.uint64)
    tokens = np.asarray(token_ids[: num_blocks * tokens_per_block], dtype=np.uint32).reshape(num_blocks, -1)
    own = _mix(np.einsum("ij,j->i", tokens, _coefficients(tokens_per_block)))
    # The chain c[i] = c[i-1] * STEP + own[i] has the closed form STEP**(i+1) * (c[-1] + sum_j own[j] * STEP**-(j+1)),
    # which is a cumulative sum. The finaliser is a bijection, so a chain can go on from a published hash.
    powers, inverses = _powers(1 << (num_blocks - 1).bit_length())
    own *= inverses[:num_blocks]
    own[:1] += np.uint64(_unmix(parent))
    chain = np.add.accumulate(own)
    chain *= powers[:num_blocks]
    return _mix(chain)


@lru_cache(maxsize=16)
def _coefficients(count: int) -> Hashes:
    """Return the first of a fixed sequence of odd random numbers.

    A token that is replaced changes the sum by coefficient * d with 0 < |d| < 2**32, an exchange of two tokens by the
    difference of their coefficients * d. Neither is 0 modulo 2**64: the first is odd times d, and the differences are
    not divisible by 2**32, which holds for the first 4,096 numbers.
    """
    digest = hashlib.shake_128(b"coefficients of block hashes").digest(8 * count)
    numbers = np.frombuffer(digest, dtype="<u8").astype(np.uint64) | np.uint64(1)
    numbers.flags.writeable = False
    return numbers


@lru_cache(maxsize=32)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Return the first powers of the chain's multiplier, and of its inverse."""
    powers, inverses = (np.full(count, base, dtype=np.uint64) for base in (_STEP, _STEP_INVERSE))
    np.multiply.accumulate(powers, out=powers)
    np.multiply.accumulate(inverses, out=inverses)
    powers.flags.writeable = inverses.flags.writeable = False
    return powers, inverses


def _mix(x: Hashes) -> Hashes:
    """Permute 64-bit numbers, in place."""
    x ^= x >> _UPPER
    x *= _FACTOR
    x ^= x >> _LOWER
    return x


def _unmix(x: int) -> int:
    x ^= (x >> 29) ^ (x >> 58)
    x = x * _MULTIPLIER_INVERSE & _MASK
    return x ^ (x >> 32)
