"""CacheEvents: changes of the library's ledger -> KV events with our own hashes."""

from collections.abc import Iterable

from serve.core.kv_events import KvDraft, KvRemoved, KvStored


class CacheEvents:
    """Remembers the published hash of every shared block, which the ledger knows by its key.

    Two keys with one hash (64 bits, not cryptographic) count as one block that is there while either is.
    """

    def __init__(self) -> None:
        self._published: dict[bytes, tuple[int, int]] = {}
        self._num_keys: dict[int, int] = {}

    def publish(self, key: bytes, block_hash: int, parent: int) -> None:
        """Take note of what a key stands for; before the block is registered under it."""
        self._published.setdefault(key, (block_hash, parent))

    def drain(self, changes: list[tuple[bytes, bool]]) -> list[KvStored | KvRemoved]:
        """Turn changes, which are taken out of the list, into events that say the same in the same order."""
        draft = KvDraft()
        for key, is_stored in changes:
            block_hash, parent = self._published[key]
            count = self._num_keys.get(block_hash, 0) + (1 if is_stored else -1)
            self._num_keys[block_hash] = count
            if is_stored and count == 1:
                draft.store(block_hash, parent)
            elif not is_stored and count == 0:
                draft.remove(block_hash)
        for key, _ in changes:
            if key in self._published and not self._num_keys.get(self._published[key][0]):
                self._num_keys.pop(self._published.pop(key)[0], None)
        changes.clear()
        return draft.finish()

    def hashes(self, keys: Iterable[bytes]) -> frozenset[int]:
        """Return what keys of the ledger are published as."""
        return frozenset(self._published[key][0] for key in keys)
