"""FleetViews and PrefixMatches by hand: columns that are not named are 0, and rates 1."""

from dataclasses import fields

import numpy as np

from serve.core.routing.decision import FleetView, PrefixMatch
from serve.core.routing.request import RouteRequest

_SCALARS = {"replica_ids", "rows", "tokens_per_block", "now_s", "decisions"}
_ONES = {"total_blocks", "prefill_token_s", "queued_token_s", "decode_step_s", "assigned_share"}


def view(count: int, **columns: list[float]) -> FleetView:
    """Return a view of `count` replicas r0, r1, …; blocks have 16 tokens."""
    given = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    names = {column.name for column in fields(FleetView)} - _SCALARS
    assert set(given) <= names
    made = {name: np.full(count, 1.0 if name in _ONES else 0.0) for name in names - set(given)}
    ids = tuple(f"r{number}" for number in range(count))
    return FleetView(ids, np.arange(count), tokens_per_block=16, now_s=0.0, decisions=0, **given, **made)


def match(
    hits: list[float],
    prompt_blocks: int,
    *,
    host: list[float] | None = None,
    disk: list[float] | None = None,
    common: int = 0,
) -> PrefixMatch:
    """Return a match of these hits."""
    found, on_host, on_disk = (np.array(column or [0.0] * len(hits), dtype=np.float64) for column in (hits, host, disk))
    return PrefixMatch(found, on_host, on_disk, prompt_blocks, common)


def request(prompt_tokens: int, *, session: str = "", lora: str = "") -> RouteRequest:
    """Return a request of this length; policies look at no hashes."""
    return RouteRequest(1, (), prompt_tokens, session=session, lora=lora)
