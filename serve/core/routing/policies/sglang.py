"""SglangPolicy: the cache-aware policy of SGLang's gateway."""

import random
from dataclasses import dataclass
from typing import ClassVar

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class SglangPolicy:
    """The least busy of those with the longest match, unless that one is far above the mean; else the least busy.

    Attributes:
        cache_threshold: A longest match of at most this share of the prompt counts as none.
        balance_rel_threshold, balance_abs_threshold: The match is not followed if its replica has more than rel times
            the mean number of requests, and more than abs requests above the mean.

    Source: smg-project/smg, which SGLang's gateway became, model_gateway/src/policies/cache_aware.rs
    (`select_matched_candidate`, `gate_selected_candidate`), defaults of its command line; August 2026. The older
    gateway (sgl-project/sglang, sgl-model-gateway) compares the busiest with the idlest replica instead, with the same
    numbers. With KV events it needs no share to follow a match: that is `cache_threshold: 0`. Departure: blocks that
    most recent prompts begin with are credited to every replica (without it, a shared system prompt keeps an idle
    fleet's traffic on one replica; compare sglang#14305).
    """

    cache_threshold: float = 0.3
    balance_rel_threshold: float = 1.5
    balance_abs_threshold: int = 64
    name: ClassVar[str] = "sglang"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        requests, held = view.requests, match.credited_blocks
        terms = {"requests": requests, "held_blocks": held}
        longest = float(held.max())
        if longest * view.tokens_per_block <= self.cache_threshold * request.prompt_tokens:
            return Scores(requests, terms, "no_match")
        mean, load = float(requests.mean()), float(requests[held == longest].min())
        if load > self.balance_rel_threshold * mean and load > mean + self.balance_abs_threshold:
            return Scores(requests, terms, "match_too_busy")
        # The longest match first, then the fewest requests: one number orders by both.
        return Scores((longest - held) * (float(requests.max()) + 1.0) + requests, terms, "longest_match")
