"""Policies that see load and nothing else: round robin, random, power of two choices, least requests, least tokens."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from serve.core.routing.decision import Column, FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class RoundRobinPolicy:
    """Whoever was chosen longest ago. Replicas that join or leave need no counter to be reset.

    Source: NGINX's and trtllm-serve's default (`RoundRobinRouter`, tensorrt_llm/serve/router.py).
    """

    name: ClassVar[str] = "round_robin"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        return Scores(view.last_routed, {"last_routed": view.last_routed}, "turn")


@dataclass(frozen=True)
class RandomPolicy:
    """Anyone, with equal probability."""

    name: ClassVar[str] = "random"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        return Scores(np.zeros(len(view)), {}, "drawn")


@dataclass(frozen=True)
class PowerOfTwoPolicy:
    """The one with fewer requests of two drawn at random.

    Source: Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12 (2001); Ray Serve's
    default (`PowerOfTwoChoicesRequestRouter`, 2.60).
    """

    name: ClassVar[str] = "power_of_two"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        return two_choices(view, rng)


@dataclass(frozen=True)
class LeastRequestsPolicy:
    """The fewest requests in hand.

    Source: vLLM production-stack and AIBrix call it least requests; trtllm-serve's `LoadBalancingRouter`.
    """

    name: ClassVar[str] = "least_requests"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        return Scores(view.requests, {"requests": view.requests})


@dataclass(frozen=True)
class LeastTokensPolicy:
    """The fewest tokens in hand: prompt tokens still to compute, and tokens whose keys and values each step reads.

    Source: trtllm-serve's `LoadBalancingRouter` with `use_tokens`, which counts the prompt tokens of active requests.
    """

    name: ClassVar[str] = "least_tokens"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        terms = {"queued_prefill_tokens": view.queued_prefill_tokens, "context_tokens": view.context_tokens}
        return Scores(view.queued_prefill_tokens + view.context_tokens, terms)


def two_choices(view: FleetView, rng: random.Random, rule: str = "fewer_requests_of_two") -> Scores:
    """Return the scores of two candidates drawn at random, by their requests; all others come after them."""
    requests = view.requests
    drawn = np.zeros(len(view), dtype=bool)
    drawn[rng.sample(range(len(view)), min(2, len(view)))] = True
    return Scores(prefer(drawn, requests), {"requests": requests, "drawn": drawn.astype(np.float64)}, rule)


def prefer(mask: np.typing.NDArray[np.bool_], cost: Column) -> Column:
    """Return a cost by which those in `mask` come before all others; within both groups, `cost` decides.

    Args:
        mask: (num_candidates,).
        cost: (num_candidates,), finite.
    """
    return cost + np.where(mask, 0.0, float(cost.max() - cost.min()) + 1.0)
