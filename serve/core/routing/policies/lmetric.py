"""LmetricPolicy: LMetric, a product instead of a weighted sum."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from serve.core.routing.decision import FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class LmetricPolicy:
    """Prompt tokens to compute, queued ones included, times the size of the batch with this request in it.

        cost = (queued prompt tokens + prompt tokens - held tokens) * (requests + 1)

    No weight to tune: one that scales either factor scales every candidate's cost alike.

    Source: Zhang et al., "LMetric: Simple is Better - Multiplication May Be All You Need for LLM Request Scheduling",
    arXiv:2603.15202. SGLang's gateway has it, too (policies/lmetric.rs), from where the + 1: an empty batch would make
    the prompt count nothing. Departure: blocks that most recent prompts begin with are credited to every replica.
    """

    name: ClassVar[str] = "lmetric"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        computed = np.maximum(request.prompt_tokens - match.credited_blocks * view.tokens_per_block, 0.0)
        prefill_tokens = view.queued_prefill_tokens + computed
        batch = view.requests + 1.0
        return Scores(prefill_tokens * batch, {"prefill_tokens": prefill_tokens, "batch": batch})
