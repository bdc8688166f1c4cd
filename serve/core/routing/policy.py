"""Policy port: an opinion of where a request should go; and how the replica is picked that follows from it."""

import random
from typing import Protocol

import numpy as np

from serve.core.routing.decision import Decision, FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


class Policy(Protocol):
    """Scores the candidates for one request. Frozen: what it remembers is in the view."""

    @property
    def name(self) -> str:
        """What the configuration calls it."""

    @property
    def ties_at_random(self) -> bool:
        """Whether candidates of equal cost are drawn; else the one that was chosen least recently is taken."""

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        """Return a cost for each candidate; at least one."""


def decide(policy: Policy, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Decision:
    """Filter, score, pick: rank all candidates for one request.

    A candidate that has refused the request already comes after all that have not.
    """
    scores = policy.score(request, view, match, rng)
    cost = scores.cost
    if request.retried:
        refused = np.fromiter((name in request.retried for name in view.replica_ids), dtype=bool, count=len(view))
        cost = np.where(refused, np.inf, cost)
    tie = np.array([rng.random() for _ in range(len(view))]) if policy.ties_at_random else view.last_routed
    order = np.lexsort((tie, cost))
    rule = scores.rule or ("only_candidate" if len(view) == 1 else "lowest_cost")
    if len(order) > 1 and not scores.rule and cost[order[0]] == cost[order[1]]:
        rule = "tie"
    return Decision(order, rule, policy.name, view, match, scores)
