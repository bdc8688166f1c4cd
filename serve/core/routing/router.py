"""Router: the index, the fleet and the policy of one model, joined. Gateways and the simulator run this same code."""

import random
from collections.abc import Sequence

import numpy as np

from serve.core.kv_events import KvEvent
from serve.core.prefix_index import PrefixIndex
from serve.core.routing.common_prefix import CommonPrefix
from serve.core.routing.decision import Decision, FleetView, PrefixMatch
from serve.core.routing.fleet import Fleet, Reservation
from serve.core.routing.load import LoadReport
from serve.core.routing.policy import Policy, decide
from serve.core.routing.request import RouteRequest


class Router:
    """Decides for one model. Not thread-safe; never waits.

    Args:
        policy: What decides.
        tokens_per_block: Of the replicas' KV caches.
        max_index_blocks: Cap of the prefix index.
        seed: Of what is drawn at random.
    """

    def __init__(
        self, policy: Policy, tokens_per_block: int, *, max_index_blocks: int = 4_000_000, seed: int = 0
    ) -> None:
        self.policy = policy
        self.tokens_per_block = tokens_per_block
        self.index = PrefixIndex(max_index_blocks)
        self.fleet = Fleet(tokens_per_block)
        self._common = CommonPrefix()
        self._rng = random.Random(seed)
        self._recalled: set[int] = set()

    # Membership and news

    def add(self, replica_id: str, now_s: float) -> None:
        """Make a replica a candidate. It holds nothing and is idle, until it is heard of."""
        self.fleet.add(replica_id, self.index.add(replica_id), now_s)

    def remove(self, replica_id: str) -> None:
        """Forget a replica."""
        self.index.remove(replica_id)
        self.fleet.remove(replica_id)

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        """Note changes of what a replica holds, in their order."""
        row = self.index.row(replica_id)
        for event in events:
            self.index.apply(row, event)

    def report(
        self, replica_id: str, report: LoadReport, now_s: float, *, new_epoch: bool = False, heard: bool = True
    ) -> None:
        """Note a replica's load; `heard`: from itself, and not what this gateway knows of it anyway."""
        self.fleet.report(replica_id, report, now_s, new_epoch=new_epoch, heard=heard)

    # Decisions

    def route(self, request: RouteRequest, now_s: float, candidates: Sequence[str] | None = None) -> Decision | None:
        """Rank the candidates for a request; None if no candidate is known. Changes nothing: see `commit`."""
        view = self.fleet.view(now_s, candidates)
        if not len(view):
            return None
        return decide(self.policy, request, view, self._match(request, view), self._rng)

    def preview(self, request: RouteRequest, now_s: float, candidates: Sequence[str] | None = None) -> Decision | None:
        """Return what `route` would return, to someone who only wants to know; the next `route` draws the same."""
        state = self._rng.getstate()
        try:
            return self.route(request, now_s, candidates)
        finally:
            self._rng.setstate(state)

    def commit(self, request: RouteRequest, decision: Decision, now_s: float, replica_id: str | None = None) -> None:
        """Count a request as on its way to the first choice, or to `replica_id`.

        Call it as soon as the choice is made, so that the next request sees it; and after `recall`, again.
        """
        chosen = decision.replica_id if replica_id is None else replica_id
        number = decision.view.replica_ids.index(chosen)
        size = self.tokens_per_block
        hit = int(decision.match.hit_blocks[number])
        computed = max(1, request.prompt_tokens - hit * size)
        total = -(-(request.prompt_tokens + request.max_tokens) // size)
        row = int(decision.view.rows[number])
        reservation = Reservation(row, now_s, computed, decision.match.prompt_blocks - hit, total)
        work_s = computed * float(decision.view.queued_token_s[number])
        self.fleet.reserve(request.route_id, chosen, reservation, work_s)
        if request.route_id not in self._recalled:
            self._common.add(request.hashes)
        self._recalled.discard(request.route_id)

    def recall(self, route_id: int) -> None:
        """Take `commit` back: the request was refused, or nobody had room, and will be routed again at once."""
        self.fleet.recall(route_id)
        self._recalled.add(route_id)

    def settle(self, route_id: int) -> None:
        """A request has its first token, has ended, or never reached its replica: reports cover it from now on."""
        self._recalled.discard(route_id)
        self.fleet.release(route_id)

    def expected_hit_tokens(self, decision: Decision, replica_id: str) -> int:
        """Return how many prompt tokens a candidate holds, by what is known."""
        return int(decision.match.hit_blocks[decision.view.replica_ids.index(replica_id)]) * self.tokens_per_block

    def _match(self, request: RouteRequest, view: FleetView) -> PrefixMatch:
        found, rows, size = self.index.match(request.hashes), view.rows, self.tokens_per_block
        # The last token of a prompt is always computed, so a hit on all of it is worth one block less.
        usable = max(0, (request.prompt_tokens - 1) // size)
        hit = found.hit[rows].astype(np.float64)
        np.minimum(hit, usable, out=hit)
        host = disk = np.zeros(len(rows))
        if found.any_slow:
            host, disk = found.host[rows].astype(np.float64), found.disk[rows].astype(np.float64)
        return PrefixMatch(hit, host, disk, -(-request.prompt_tokens // size), self._common.depth(request.hashes))
