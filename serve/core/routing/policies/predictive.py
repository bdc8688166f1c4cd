"""PredictivePolicy: the least time, for this request and for the streams that it would disturb."""

import random
from dataclasses import dataclass

import numpy as np

from serve.core.routing.decision import Column, FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest

_FRESH_S = 1.5  # a replica reports at least twice a second; what is older than this is doubted
_DOUBT_HALF_LIFE_S = 5.0
_NEAR_S = 0.002
_UNFIT_S = 1e6  # more than any cost: the candidate is taken only if all are so


@dataclass(frozen=True)
class PredictivePolicy:
    """Expected time to first token, plus the slowdown of others. All terms are seconds, by each replica's own speed.

        queue_s     what waits there, computed at its measured rate
        prefill_s   the prompt tokens that it does not hold; what it holds in host memory or on disk costs a copy
        decode_s    what engine steps take beside prompts: its own, and those of the streams between its chunks
        slowdown_s  each stream that decodes there stops for prefill_s
        balance_s   a price on replicas that got more than their share of requests or work lately

    Leading blocks that most of the recent prompts have are counted as held everywhere: to go where they already are is
    no gain, as every replica will have them in a moment. (Predictions of the time to first token do not pretend so.)

    The weight of the slowdown grows with the backlog of the fleet, since work that is put behind a backlog delays all
    that come after it. That keeps long prompts apart from short ones when it matters, which is what shortens the tail:
    Harchol-Balter, Crovella, Murta, "On choosing a task assignment policy for a distributed server system", 1999.

    Attributes:
        slowdown_weight: What a second of one disturbed stream is worth, in seconds of this request's first token.
        backlog_weight: By how much that grows for each second of the fleet's mean queue.
        balance_weight: Price of an excess of 100 % over the mean share, in units of a mean prompt's prefill.
        max_share: A replica with more than this share of the mean for a long time gets nothing, if another can take it.
        tolerance: Costs that differ by less than this share, or 2 ms, are equal: the replica that holds most of the
            prompt keeps it; if nobody holds any of it, the one with less work lately has it.
        patience: An idle replica gets a request, whatever it holds, when this many times as many decisions as there are
            replicas have passed it over; later, the more that costs. A newcomer's cache is filled that way.
        host_cost, disk_cost: Time to fetch a block from there, relative to computing it.
        chunk_tokens: Prompt tokens computed in one step, about; `max_num_tokens` of the engines.
    """

    slowdown_weight: float = 0.05
    backlog_weight: float = 0.1
    balance_weight: float = 0.5
    max_share: float = 1.25
    tolerance: float = 0.02
    patience: float = 4.0
    host_cost: float = 0.15
    disk_cost: float = 0.5
    chunk_tokens: int = 8192
    name: str = "predictive"
    ties_at_random: bool = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        size, common = view.tokens_per_block, match.common_blocks
        held = _trusted(match.hit_blocks, view.age_s)
        copied = self._copied(match) * size
        computed = np.maximum(request.prompt_tokens - held * size, 1.0)
        queue_s = view.queued_prefill_tokens * view.queued_token_s
        real_s = prefill_s = _prefill_s(request, view, computed, copied)
        if common:
            assumed = np.maximum(request.prompt_tokens - np.maximum(held, common) * size, 1.0)
            prefill_s = _prefill_s(request, view, assumed, copied)
        # The prompt's own steps, and half of the one that runs now, if any does.
        steps = np.maximum((view.queued_prefill_tokens + computed) / self.chunk_tokens, 1.0) + 0.5 * (view.running > 0)
        decode_s = view.decode_step_s * steps
        weight = self.slowdown_weight + self.backlog_weight * _mean(queue_s)
        slowdown_s = weight * view.running * prefill_s
        share = np.maximum(view.routed_share, view.assigned_share)
        price_s = self.balance_weight * request.prompt_tokens * _mean(view.queued_token_s)
        balance_s = price_s * np.maximum(share - 1.0, 0.0)
        ttft_s = queue_s + real_s + decode_s
        cost = queue_s + prefill_s + decode_s + slowdown_s + balance_s
        if float(np.maximum.reduce(view.lasting_share)) > self.max_share:
            over = view.lasting_share > self.max_share
            if not over.all():
                cost += _UNFIT_S * over
        terms = {
            "queue_s": queue_s,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "slowdown_s": slowdown_s,
            "balance_s": balance_s,
        }
        forgotten = self._forgotten(cost, price_s, view)
        if forgotten is not None:
            cost[forgotten] = float(np.minimum.reduce(cost)) - 1.0
            return Scores(cost, terms, "unused", ttft_s)
        beyond = match.hit_blocks if not common else np.maximum(match.hit_blocks - common, 0.0)
        cost, rule = self._settle_ties(cost, share, beyond)
        return Scores(cost, terms, rule, ttft_s)

    def _forgotten(self, cost: Column, price_s: float, view: FleetView) -> int | None:
        """Return an idle replica that was passed over for so long that it is worth its cost to fill its cache.

        The dearer, the later: one without any cost after `patience` times as many decisions as there are replicas, one
        where the whole prompt has to be computed after twice that.
        """
        limit = self.patience * len(view)
        if view.decisions - float(np.minimum.reduce(view.last_routed)) <= limit:
            return None
        waited = view.decisions - view.last_routed
        loss = (cost - float(np.minimum.reduce(cost))) / max(2.0 * price_s, 1e-9)
        due = (waited > limit * (1.0 + loss)) & (view.running + view.waiting == 0.0)
        return int(np.where(due, waited, -1.0).argmax()) if due.any() else None

    def _copied(self, match: PrefixMatch) -> Column | float:
        """Return how many blocks' computation the copies from slower tiers are worth."""
        if match.host_blocks is match.disk_blocks:  # the same nothing
            return 0.0
        return self.host_cost * match.host_blocks + self.disk_cost * match.disk_blocks

    def _settle_ties(self, cost: Column, share: Column, beyond: Column) -> tuple[Column, str]:
        best = float(np.minimum.reduce(cost))
        near = cost <= best + max(_NEAR_S, self.tolerance * best)
        if np.count_nonzero(near) < 2:
            return cost, ""
        # Hysteresis: a prompt stays with who holds most of it, unless somebody else is clearly better.
        holder = int((near * (beyond + 1e-9)).argmax())
        if beyond[holder] > 0.0 and beyond[holder] == np.maximum.reduce(beyond):
            return np.where(np.arange(len(cost)) == holder, best - 1.0, cost), "kept_prefix"
        # Among equals the one with the least work lately. Below the least real cost, and never equal to it.
        return np.where(near, best - 1.0 + 1e-3 * share, cost), "near_tie"


def _prefill_s(request: RouteRequest, view: FleetView, computed: Column, copied: Column | float) -> Column:
    pairs = computed * (request.prompt_tokens - 0.5 * computed)
    return (computed + copied) * view.prefill_token_s + pairs * view.prefill_pair_s


def _mean(column: Column) -> float:
    return float(np.add.reduce(column)) / len(column)


def _trusted(hit_blocks: Column, age_s: Column) -> Column:
    """Return how many blocks to count on: a replica that was not heard of for long may have evicted some."""
    if float(np.maximum.reduce(age_s)) <= _FRESH_S:
        return hit_blocks
    return hit_blocks * 0.5 ** (np.maximum(age_s - _FRESH_S, 0.0) / _DOUBT_HALF_LIFE_S)
