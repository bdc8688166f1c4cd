"""AibrixPolicy: AIBrix's prefix-cache router."""

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from serve.core.routing.decision import Column, FleetView, PrefixMatch, Scores
from serve.core.routing.policies.least_load import prefer
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class AibrixPolicy:
    """The best match that is not too busy, while the fleet is balanced; the fewest requests if not.

    If the busiest has more than `imbalance_requests` requests more than the idlest, only the idlest are candidates. Of
    the candidates that hold any of the prompt and have at most mean + `deviation_factor` sigma requests, the highest
    match in whole percent wins, then the fewest requests, then the lot. If there are none, the fewest requests.

    Source: vllm-project/aibrix, pkg/plugins/gateway/algorithms/prefix_cache.go, August 2026; sigma is the sample's.
    Departure: blocks that most recent prompts begin with are credited to every replica (AIBrix#842).
    """

    imbalance_requests: int = 8
    deviation_factor: float = 1.0
    name: ClassVar[str] = "aibrix"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        requests = view.requests
        percent: Column = np.floor(100.0 * match.credited_blocks / match.prompt_blocks)
        mean = float(requests.mean())
        limit = mean + self.deviation_factor * _sigma(requests, mean)
        least, most = float(requests.min()), float(requests.max())
        eligible = (percent > 0.0) & (requests <= limit)
        rule = "best_match"
        if most - least > self.imbalance_requests:
            eligible &= requests == least
            rule = "imbalanced"
        terms = {"match_percent": percent, "requests": requests, "eligible": eligible.astype(np.float64)}
        if not eligible.any():
            return Scores(requests, terms, rule if rule == "imbalanced" else "no_match")
        return Scores(prefer(eligible, requests - percent * (most + 1.0)), terms, rule)


def _sigma(requests: Column, mean: float) -> float:
    if len(requests) == 1:
        return 0.0
    deviation = requests - mean
    return math.sqrt(float(deviation @ deviation) / (len(requests) - 1))
