"""ChainSeeds: with which seed of ours a chain of KV blocks begins, that is, under which cache salt it was computed.

Events of TensorRT-LLM 1.2.x carry a chain's tokens, but not its salt. Publishing a salted chain as an unsalted one
would send requests to a replica that cannot reuse it. So, for the first block of a chain, in this order:

1. the event names the salt (newest line);
2. no request with a salt was ever given to this engine: there is none;
3. the block's hash is the one that its tokens have without a salt, or with the salt of a request that fits
   (`block_key.py`);
4. all requests that were in flight lately and begin with these tokens have the same salt: a chain is only ever
   stored for a request that is in flight.

Where none of these tells, the chain is not published.
"""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from serve.core.blocks import ROOT, chain_seed
from serve.engines.trtllm.block_key import block_key, salt_id_of

LINGER_S = 10.0  # how long after its end a request's blocks may still be told of; events are read many times a second
_MAX_ENDED = 1 << 16
_MAX_CHECKS = 64  # chains whose hash is compared although no salt is in use, to learn whether `block_key` is right
_PRIVATE = "raytrt-private-"
_private_numbers = itertools.count()


def private_salt() -> str:
    """Return a salt that no other request has: nothing is reused, and what is stored is not published."""
    return f"{_PRIVATE}{next(_private_numbers)}"


class ChainSeeds:
    """Knows the requests that chains may come from. Thread-safe; the time is passed in.

    Args:
        tokens_per_block: Size of a KV block.
        digest: BLAKE3; None if it is not installed, and salts cannot be hashed as 1.2.x does it.
    """

    def __init__(self, tokens_per_block: int, digest: Callable[[bytes], bytes] | None = None) -> None:
        self._head_bytes = 4 * tokens_per_block
        self._digest = digest
        self._lock = threading.Lock()
        self._live: dict[str, tuple[bytes, str]] = {}  # first tokens, at most a block, and salt
        self._ended: deque[tuple[float, bytes, str]] = deque()
        self._salts: dict[bytes, Counter[str]] = {}  # of the requests above, by their first tokens
        self._any_salt = False
        self._key_is_right = False
        self._checks = 0

    def begin(self, name: str, prompt: npt.NDArray[np.uint32], salt: str) -> None:
        """Take note of a request before the engine gets it.

        Args:
            name: Unique among requests in flight.
            prompt: Its token ids.
            salt: Its cache salt; empty for none.
        """
        head = prompt.astype("<u4", copy=False).tobytes()[: self._head_bytes]
        with self._lock:
            self._any_salt = self._any_salt or bool(salt)
            self._live[name] = (head, salt)
            self._salts.setdefault(head, Counter())[salt] += 1

    def end(self, name: str, now_s: float) -> None:
        """Take note that a request is over; harmless if it is unknown."""
        with self._lock:
            source = self._live.pop(name, None)
            if source is not None:
                self._ended.append((now_s, *source))
            while self._ended and (self._ended[0][0] < now_s - LINGER_S or len(self._ended) > _MAX_ENDED):
                _, head, salt = self._ended.popleft()
                self._drop(head, salt)

    def seed(self, token_ids: Sequence[int], key: int | str, *, has_v1_key: bool, salt: str | None) -> int | None:
        """Return the parent, in our hashes, of a chain's first block; None if it is not to be published.

        Args:
            token_ids: Of the first block, all of it.
            key: Its hash in the engine.
            has_v1_key: Whether that is a v1 block key.
            salt: What the event says; None if it says nothing.
        """
        if salt is not None:
            return _seed_of(salt)
        with self._lock:
            is_plain = has_v1_key and self._is_plain(token_ids, key)
            if is_plain or not self._any_salt:
                return ROOT
            salts = self._candidates(np.asarray(token_ids, dtype="<u4").tobytes())
            if has_v1_key and self._key_is_right:
                salts.discard("")  # or the hash would have told
            hashed = self._hashed(token_ids, key, salts) if has_v1_key else None
        if hashed is not None:
            return _seed_of(hashed)
        return _seed_of(salts.pop()) if len(salts) == 1 else None

    def _candidates(self, head: bytes) -> set[str]:
        """Return the salts of all requests whose prompt begins with these tokens, or is the beginning of them."""
        found: set[str] = set()
        for end in range(4, len(head) + 1, 4):
            found.update(self._salts.get(head[:end], ()))
        return found

    def _is_plain(self, token_ids: Sequence[int], key: int | str) -> bool:
        """Return whether the hash is that of these tokens without a salt."""
        if not self._any_salt:
            self._checks += 1
            if self._checks > _MAX_CHECKS:
                return True  # it does not matter, and hashing takes time
        is_equal = block_key(token_ids) == key
        self._key_is_right = self._key_is_right or is_equal
        return is_equal

    def _hashed(self, token_ids: Sequence[int], key: int | str, salts: Iterable[str]) -> str | None:
        if self._digest is None:
            return None
        for salt in filter(None, salts):
            if block_key(token_ids, salt_id=salt_id_of(self._digest(salt.encode()))) == key:
                return salt
        return None

    def _drop(self, head: bytes, salt: str) -> None:
        counts = self._salts[head]
        counts[salt] -= 1
        if not counts[salt]:
            del counts[salt]
        if not counts:
            del self._salts[head]


def _seed_of(salt: str) -> int | None:
    if salt.startswith(_PRIVATE):
        return None
    return chain_seed(salt) if salt else ROOT
