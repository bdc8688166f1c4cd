"""RoutingBoard: the routing of one model in one gateway process: who gets which sequence, and what became of that.

It belongs to one event loop and never waits. Ray Serve's router asks it (`serve.router.replica_router`), and the
gateway tells it of sequences (`serve.ingress.routing_desk`).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import msgspec

from serve.core.request import GenerateRequest
from serve.core.routing.decision import Decision, FleetView
from serve.core.routing.request import RouteRequest
from serve.core.routing.router import Router
from serve.core.routing.settings import RoutingSettings
from serve.router.counts import RoutingCounts
from serve.router.hints import NO_HINTS
from serve.router.roster import Feeds, Roster
from serve.router.trace import RouteTrace

MAX_BEST = 8  # replicas that are asked one by one
MAX_STRANGERS = 4096  # calls that other code than the gateway makes, on their way to a replica


class Choice(NamedTuple):
    """An answer to Ray Serve's router.

    Attributes:
        best: The best replicas that have room, best first; empty if none has. All others are as good as each other.
        request: What to send, with what the gateway believes of the first one's cache.
    """

    best: list[str]
    request: GenerateRequest


class RoutingBoard:
    """Routing of one model.

    Args:
        model: Its id.
        settings: Section `routing` of its configuration.
        make_feeds: Makes what hears its replicas.
        clock: `time.monotonic`, or what a test has instead.

    Attributes:
        model: The same.
        counts: What is counted.
        roster: Its replicas.
        fairness: How sequences wait while no replica has room.
    """

    def __init__(
        self,
        model: str,
        settings: RoutingSettings,
        make_feeds: Callable[[Roster], Feeds],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.counts = RoutingCounts()
        self.roster = Roster(model, settings, make_feeds, clock)
        self.fairness = settings.fairness
        self._clock = clock
        self._open: dict[str, RouteTrace] = {}
        self._strangers: dict[str, RouteTrace] = {}

    # Sequences

    def open(self, trace: RouteTrace) -> None:
        """A sequence is about to be routed; `close` has to follow."""
        self._open[trace.sequence_id] = trace

    def choose(
        self, request: GenerateRequest, refused_by: str = "", has_room: Callable[[str], bool] = lambda replica_id: True
    ) -> Choice | None:
        """Rank the replicas for a sequence, and count it as on its way to the first; None if no replica is known.

        Args:
            request: The sequence; chosen for before, perhaps.
            refused_by: Who did not take it last time; empty: nobody was asked.
            has_room: Whether a replica would take it, as far as Ray Serve knows.
        """
        started_s = time.perf_counter()
        router = self.roster.router
        if router is None:
            return None
        trace = self._open.get(request.request_id) or self._stranger(request)
        if refused_by:
            trace.was_refused(refused_by)
            self.counts.refusals += 1
        route = self._route_of(trace, router, request)
        now_s = self._clock()
        decision = router.route(route, now_s)
        if decision is None:
            return None
        best, passed_over = _with_room(decision, has_room)
        asked = best[0] if best else decision.replica_id
        router.commit(route, decision, now_s, asked)
        trace.decided(router, decision, now_s, asked, passed_over)
        self.counts.count_decision(trace, time.perf_counter() - started_s)
        return Choice(best, _expecting(request, trace.expected_tokens))

    def preview(self, request: GenerateRequest, trace: RouteTrace) -> None:
        """Note in `trace` where the sequence would go; changes nothing else."""
        router = self.roster.router
        if router is None:
            return
        route = self._make_route(trace, router, request)
        decision = router.preview(route, self._clock())
        if decision is not None:
            trace.decided(router, decision, self._clock(), decision.replica_id)

    def accepted(self, sequence_id: str, replica_id: str) -> None:
        """A replica has taken a sequence."""
        stranger = self._strangers.pop(sequence_id, None)
        trace = stranger or self._open.get(sequence_id)
        if trace is None or trace.routed_s:
            return
        self._move(trace, replica_id)
        self._explain_misses(trace, replica_id)
        trace.accepted(replica_id, self._clock())
        if stranger is None:
            self.roster.has(trace)

    def _move(self, trace: RouteTrace, replica_id: str) -> None:
        """Count a sequence where it is, if Serve found that another one than was to be asked has room."""
        router, decision, route = trace.router, trace.decision, trace.route
        if router is None or router is not self.roster.router or decision is None or route is None or trace.first_s:
            return
        candidates = decision.view.replica_ids
        if trace.asked_id != replica_id and replica_id in candidates and replica_id in router.fleet:
            router.recall(trace.route_id)
            router.commit(route, decision, self._clock(), replica_id)

    def _explain_misses(self, trace: RouteTrace, replica_id: str) -> None:
        decision, prompt = trace.decision, trace.prompt
        if decision is None or prompt is None or replica_id not in decision.view.replica_ids:
            return
        hits = decision.match.hit_blocks
        hit = int(hits[decision.view.replica_ids.index(replica_id)])
        blocks = prompt.reusable()
        trace.misses = self.roster.misses.explain(blocks, hit, int(hits.max()))
        self.roster.misses.sent(blocks)
        self.counts.count_misses(trace)

    def began(self, trace: RouteTrace) -> None:
        """The first token of a sequence has come; from now on its replica's reports cover it."""
        self.accepted(trace.sequence_id, trace.replica_id)  # Serve's news of it may be slower than the token
        self._settle(trace)
        self.roster.has(trace)
        self.counts.count_first_token(trace)

    def close(self, trace: RouteTrace) -> None:
        """A sequence has ended, or will never begin."""
        self._open.pop(trace.sequence_id, None)
        self._settle(trace)
        self.roster.ended(trace)
        trace.forget_prompt()

    def _settle(self, trace: RouteTrace) -> None:
        if trace.router is not None:
            trace.router.settle(trace.route_id)

    # Requests

    def _stranger(self, request: GenerateRequest) -> RouteTrace:
        """Return the trace of a call that nobody announced, and whose end nobody will tell."""
        trace = self._strangers.get(request.request_id)
        if trace is None:
            trace = RouteTrace(request, NO_HINTS, self._clock())
            if len(self._strangers) >= MAX_STRANGERS:
                self.close(self._strangers.pop(next(iter(self._strangers))))
            self._strangers[request.request_id] = trace
        return trace

    def _route_of(self, trace: RouteTrace, router: Router, request: GenerateRequest) -> RouteRequest:
        """Return what to route, after taking back what was counted for it before."""
        if trace.route is None or trace.router is not router:
            trace.route = self._make_route(trace, router, request)
        else:
            router.recall(trace.route_id)
        if trace.avoided.issuperset(router.fleet.replica_ids):  # all are full: whoever has room first gets it
            trace.avoided = frozenset()
        if trace.avoided != trace.route.retried:
            trace.route = replace(trace.route, retried=trace.avoided)
        return trace.route

    def _make_route(self, trace: RouteTrace, router: Router, request: GenerateRequest) -> RouteRequest:
        trace.prompt = self.roster.hasher.hashed(request)
        hints = trace.hints
        return RouteRequest(
            trace.route_id,
            trace.prompt.hashes,
            trace.prompt_tokens,
            trace.max_tokens,
            hints.session,
            trace.lora,
            hints.tenant,
        )

    # Room, for those who wait for it

    def view(self) -> FleetView | None:
        """Return the state of all replicas; None before the first."""
        return self.roster.router.fleet.view(self._clock()) if self.roster.router is not None else None

    def best_hit_tokens(self, request: GenerateRequest, trace: RouteTrace) -> int:
        """Return how many prompt tokens the replica holds that holds most."""
        router = self.roster.router
        if router is None:
            return 0
        decision = router.preview(self._make_route(trace, router, request), self._clock())
        return int(decision.match.hit_blocks.max()) * router.tokens_per_block if decision is not None else 0


def _with_room(decision: Decision, has_room: Callable[[str], bool]) -> tuple[list[str], tuple[str, ...]]:
    """Return the best that have room, and those that are better than the first of them."""
    best: list[str] = []
    passed_over: list[str] = []
    for row in decision.order.tolist():
        replica_id = decision.view.replica_ids[row]
        if has_room(replica_id):
            best.append(replica_id)
            if len(best) == MAX_BEST:
                break
        elif not best:
            passed_over.append(replica_id)
    return best, tuple(passed_over)


def _expecting(request: GenerateRequest, tokens: int) -> GenerateRequest:
    if request.expected_cached_tokens == tokens:
        return request
    return msgspec.structs.replace(request, expected_cached_tokens=tokens)
