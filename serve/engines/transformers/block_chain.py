"""BlockChain: the identity of each KV block of one sequence, for the engine's ledger and for the outside world.

A block has a key and a hash. The *key* decides whether KV memory is shared, so nobody must be able to forge it: 128
bits of BLAKE2b under a secret of the process, chained from the request's salt. The *hash* is the published one
(`serve.core.blocks`); it only routes requests.
"""

import hashlib

import numpy as np

from serve.core.blocks import block_hashes, chain_seed

_KEY_BYTES = 16
_TOKEN_BYTES = 4


class BlockChain:
    """Keys and hashes of a growing sequence, computed as far as they are asked for.

    Args:
        prompt: Token ids as `serve.core.request.pack_tokens` packs them.
        tokens_per_block: > 0.
        salt: Sequences of different salts have no block in common.
        secret: At most 64 bytes, the same for all chains of one cache.
    """

    def __init__(self, prompt: bytes, tokens_per_block: int, salt: str, secret: bytes) -> None:
        self.salt = salt
        self._tokens = bytearray(prompt)
        self._block_bytes = tokens_per_block * _TOKEN_BYTES
        self._tokens_per_block = tokens_per_block
        self._secret = secret
        self._root_key = hashlib.blake2b(salt.encode(), digest_size=_KEY_BYTES, key=secret).digest()
        self._root_hash = chain_seed(salt)
        self._keys: list[bytes] = []
        self._hashes: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self._tokens) // _TOKEN_BYTES

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self._tokens += token_id.to_bytes(_TOKEN_BYTES, "little")

    def token_ids(self) -> list[int]:
        """Return prompt and output."""
        token_ids: list[int] = np.frombuffer(bytes(self._tokens), dtype="<u4").tolist()
        return token_ids

    def key(self, block: int) -> bytes:
        """Return the key of a full block.

        Raises:
            IndexError: The sequence does not reach the end of that block.
        """
        while len(self._keys) <= block:
            parent = self._keys[-1] if self._keys else self._root_key
            data = parent + self._block(len(self._keys))
            self._keys.append(hashlib.blake2b(data, digest_size=_KEY_BYTES, key=self._secret).digest())
        return self._keys[block]

    def published(self, block: int) -> tuple[int, int]:
        """Return the hash of a full block, and its parent's.

        Raises:
            IndexError: The sequence does not reach the end of that block.
        """
        if len(self._hashes) <= block:
            first = len(self._hashes)
            self._block(block)
            data = bytes(self._tokens[first * self._block_bytes :])
            parent = self._hashes[-1] if first else self._root_hash
            hashes = block_hashes(np.frombuffer(data, dtype="<u4"), self._tokens_per_block, parent)
            self._hashes.extend(hashes.tolist())
        return self._hashes[block], self._hashes[block - 1] if block else self._root_hash

    def _block(self, block: int) -> bytes:
        data = bytes(self._tokens[block * self._block_bytes : (block + 1) * self._block_bytes])
        if len(data) < self._block_bytes:
            raise IndexError(f"block {block} is not full: the sequence has {self.num_tokens} tokens")
        return data
