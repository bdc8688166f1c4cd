"""DynamoPolicy: NVIDIA Dynamo's KV router."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from serve.core.routing.decision import Column, FleetView, PrefixMatch, Scores
from serve.core.routing.request import RouteRequest


@dataclass(frozen=True)
class DynamoPolicy:
    """Prompt blocks to compute, queued ones included, plus blocks that each decode step reads.

        cost = prefill_load_scale * max(0, (queued tokens + prompt tokens) / block size - credit)
               + active blocks with the request + active_request_weight * requests
        credit = decay * overlap_credit * GPU hits + host_hit_weight * host hits + disk_hit_weight * disk hits
        decay = 1 / (1 + overlap_credit_decay * (queued tokens above the least) / prompt tokens)

    The lowest cost wins, equal ones by lot. A temperature above 0 draws by softmax of -cost / temperature, the cost
    divided by its range.

    Source: ai-dynamo/dynamo, lib/kv-router/src/scheduling/selector/default.rs and config.rs, 2026; "Routing Concepts".
    Departures: blocks that most recent prompts begin with are credited to every replica, in full and whatever their
    tier (without it, an idle fleet sends everything to the replica that was warm first); blocks that other running
    requests share with this one are not told apart, so the request counts with all its blocks; no shared cache, taints
    and pinning.
    """

    overlap_credit: float = 1.0
    overlap_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    host_hit_weight: float = 0.75
    disk_hit_weight: float = 0.25
    active_request_weight: float = 0.0
    temperature: float = 0.0
    name: ClassVar[str] = "dynamo"
    ties_at_random: ClassVar[bool] = True

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        queued = view.queued_prefill_tokens
        raw_blocks = (queued + request.prompt_tokens) / view.tokens_per_block
        prefill = self.prefill_load_scale * np.maximum(raw_blocks - self._credit(request, queued, match), 0.0)
        decode = view.active_blocks + match.prompt_blocks
        cost = prefill + decode
        terms = {"prefill_blocks": prefill, "decode_blocks": decode}
        if self.active_request_weight:
            terms["request_blocks"] = self.active_request_weight * view.requests
            cost = cost + terms["request_blocks"]
        if self.temperature > 0.0:
            return Scores(_draw(cost, self.temperature, rng), {**terms, "cost_blocks": cost}, "drawn_by_cost")
        return Scores(cost, terms)

    def _credit(self, request: RouteRequest, queued_tokens: Column, match: PrefixMatch) -> Column:
        common = float(match.common_blocks)
        # What lies beyond the common blocks; engines offload the end of a chain first.
        beyond = np.maximum(match.hit_blocks - common, 0.0)
        host = np.minimum(match.host_blocks, beyond)
        disk = np.minimum(match.disk_blocks, beyond - host)
        overlap_credit: float | Column = self.overlap_credit
        if self.overlap_credit_decay > 0.0:
            excess = (queued_tokens - queued_tokens.min()) / request.prompt_tokens
            overlap_credit = self.overlap_credit / (1.0 + self.overlap_credit_decay * excess)
        gpu: Column = overlap_credit * (common + beyond - host - disk)
        slower: Column = self.host_hit_weight * host + self.disk_hit_weight * disk
        credit: Column = gpu + slower
        return credit


def _draw(cost: Column, temperature: float, rng: random.Random) -> Column:
    """Return a column whose least element is a draw by softmax(-cost / range / temperature): the Gumbel trick."""
    spread = float(cost.max() - cost.min()) or 1.0
    uniform = np.array([rng.random() for _ in range(len(cost))])
    drawn: Column = (cost - cost.min()) / (spread * temperature) + np.log(-np.log(np.maximum(uniform, 1e-300)))
    return drawn
