"""LongestPrefixPolicy: wherever most of the prompt is. The baseline that shows why load has to count, too."""

import random
from dataclasses import dataclass
from typing import ClassVar

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class LongestPrefixPolicy:
    """The most hit blocks, whatever the load.

    Starves replicas when prompts share a prefix, on purpose: it is here to be compared with.

    Source: vLLM production-stack's `PrefixAwareRouter` (src/vllm_router/routers/routing_logic.py), which takes the
    longest match in its trie, and any of them if several match equally.
    """

    name: ClassVar[str] = "longest_prefix"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        return Scores(-match.hit_blocks, {"hit_blocks": match.hit_blocks})
