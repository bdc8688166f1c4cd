"""PredictivePolicy: the least time, for this request and for the streams that it would disturb."""

import random
from dataclasses import dataclass

import numpy as np

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class PredictivePolicy:
    """Expected time to first token, plus the slowdown of others. In seconds.

    Attributes:
        slowdown_weight: What a second of one disturbed stream is worth, in seconds of this request's first token.
        output_tokens: Assumed output, where the client named no limit or a generous one.
    """

    slowdown_weight: float = 1.0
    output_tokens: int = 256
    name: str = "predictive"
    ties_at_random: bool = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        size = view.tokens_per_block
        cached = match.hit_blocks * size
        computed = np.maximum(request.prompt_tokens - cached, 1.0)
        own_s = computed * view.prefill_token_s + computed * (cached + 0.5 * computed) * view.prefill_pair_s
        queue_s = view.queued_prefill_tokens * view.prefill_token_s
        slowdown_s = own_s * view.running
        cost = queue_s + own_s + self.slowdown_weight * slowdown_s
        ttft_s = queue_s + own_s
        return Scores(cost, {"queue_s": queue_s, "prefill_s": own_s, "slowdown_s": slowdown_s}, "", ttft_s)
