"""RayLlmPrefixPolicy: Ray Serve LLM's prefix-aware router."""

import random
from dataclasses import dataclass
from typing import ClassVar

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.policies.least_load import prefer, two_choices
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class RayLlmPrefixPolicy:
    """The shortest queue of those with the longest match, if that is long enough and the load balanced; else two drawn.

    Attributes:
        match_rate_threshold: Share of the prompt that has to match.
        imbalanced_threshold: If the longest queue exceeds the shortest by more requests, matches are not looked at.

    Source: Ray 2.60, `PrefixCacheAffinityRouter` (ray/llm/_internal/serve/routing_policies/prefix_aware). Departures:
    it matches characters of what it has sent where, here are tokens and what is really cached; below the threshold it
    prefers the replicas that it has sent the fewest characters, here are two drawn at random; blocks that most recent
    prompts begin with are credited to every replica.
    """

    match_rate_threshold: float = 0.1
    imbalanced_threshold: float = float("inf")
    name: ClassVar[str] = "ray_llm_prefix"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        requests, held = view.requests, match.credited_blocks
        if float(requests.max() - requests.min()) > self.imbalanced_threshold:
            return two_choices(view, rng, "imbalanced")
        longest = float(held.max())
        if longest * view.tokens_per_block < self.match_rate_threshold * request.prompt_tokens:
            return two_choices(view, rng, "no_match")
        return Scores(prefer(held == longest, requests), {"requests": requests, "held_blocks": held}, "longest_match")
