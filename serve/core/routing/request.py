"""RouteRequest: what a routing decision knows of a request."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from serve.core.blocks import Hashes


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One sequence that needs a replica.

    Attributes:
        route_id: Names it in reservations and load reports; see `route_id`.
        hashes: (num_full_blocks,) chained hashes of the prompt's full KV blocks (`serve.core.blocks`); an array is
            faster than Python ints.
        prompt_tokens: > 0.
        max_tokens: Output tokens at most; 0 if unknown.
        session: Requests of one session would like one replica; empty: none.
        lora: LoRA adapter; empty: the base model.
        tenant: Who is accountable, for counters and fairness; empty: the default tenant.
        retried: Replicas that have refused it already.
    """

    route_id: int
    hashes: Sequence[int] | Hashes
    prompt_tokens: int
    max_tokens: int = 0
    session: str = ""
    lora: str = ""
    tenant: str = ""
    retried: frozenset[str] = frozenset()


def route_id(request_id: str) -> int:
    """Return the 64-bit name of a request in reservations and load reports."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")
