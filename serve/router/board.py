"""RoutingBoard: the routing of one model in one gateway process. Joins the decision core to what is heard of replicas.

It belongs to one event loop and never waits. Ray Serve's router asks it (`serve.router.replica_router`), the gateway's
backend tells it of sequences (`serve.router.desk`), and the event plane of replicas.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import msgspec

from serve.core.kv_events import KvEvent
from serve.core.request import GenerateRequest
from serve.core.routing.decision import FleetView
from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.load import LoadReport
from serve.core.routing.miss_reasons import MissHistory
from serve.core.routing.request import RouteRequest
from serve.core.routing.router import Router
from serve.core.routing.settings import RoutingSettings, make_policy
from serve.router.counts import RoutingCounts
from serve.router.hints import NO_HINTS
from serve.router.membership import Membership, rescaled
from serve.router.own_load import OwnLoad
from serve.router.prompt_hasher import PromptHasher
from serve.router.replica_feed import PlaneCounts
from serve.router.trace import RouteTrace
from serve.router.wire import PlaneAddress

logger = logging.getLogger(__name__)

MAX_STRANGERS = 4096  # calls that other code than the gateway makes, on their way to a replica


class Feeds(Protocol):
    """Hears replicas: what they hold and how busy they are. Tells the board that it was made for.

    Attributes:
        counts: What it has heard, and missed.
    """

    counts: PlaneCounts

    def listen(self, replica_id: str, address: PlaneAddress) -> None:
        """Begin to hear a replica."""

    def forget(self, replica_id: str) -> None:
        """Stop hearing a replica."""

    def close(self) -> None:
        """Stop hearing all."""


class Choice(NamedTuple):
    """An answer to Ray Serve's router.

    Attributes:
        ranked: Replicas, best first.
        request: What to send, with what the gateway believes of the first one's cache.
    """

    ranked: list[str]
    request: GenerateRequest


class RoutingBoard:
    """Routing of one model.

    Args:
        model: Its id.
        settings: Section `routing` of its configuration.
        make_feeds: Makes what hears its replicas; called once, with the board.
        clock: `time.monotonic`, or what a test has instead.
    """

    def __init__(
        self,
        model: str,
        settings: RoutingSettings,
        make_feeds: Callable[["RoutingBoard"], Feeds],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.counts = RoutingCounts()
        self._settings = settings
        self._feeds = make_feeds(self)
        self._clock = clock
        self._router: Router | None = None
        self._members = Membership()
        self._heard: set[str] = set()
        self._reports: dict[str, LoadReport] = {}
        self._own_load = OwnLoad()
        self._misses = MissHistory()
        self._open: dict[str, RouteTrace] = {}
        self._strangers: dict[str, RouteTrace] = {}
        self._hasher = PromptHasher(1)

    # Replicas

    def set_replicas(self, replicas: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in which replicas run.

        Args:
            replicas: Id to what the replica said of itself when it started (`record_replica_metadata`).
        """
        added, removed = self._members.update(replicas)
        for replica_id in removed:
            self._drop(replica_id)
        router, size = self._router, self._members.tokens_per_block
        if size and (router is None or router.tokens_per_block != size):
            router, added = self._start_router(size), list(self._members)
        for replica_id in added:
            if router is not None:
                router.add(replica_id, self._clock())
            self._listen(replica_id)

    def replica_died(self, replica_id: str) -> None:
        """Forget a replica at once; it stays forgotten, even if Serve's controller still lists it for a while."""
        if self._members.bury(replica_id):
            self._drop(replica_id)

    def _start_router(self, size: int) -> Router:
        """Begin with an empty index, of blocks as most replicas have them."""
        if self._router is not None:
            logger.info("%s: replicas have blocks of %d tokens now; the prefix index starts anew.", self.model, size)
            for replica_id in self._members:
                self._feeds.forget(replica_id)  # and heard again, it sends a snapshot
        self._router = Router(make_policy(self._settings), size, max_index_blocks=self._settings.max_index_blocks)
        self._hasher = PromptHasher(size)
        return self._router

    def _listen(self, replica_id: str) -> None:
        member = self._members[replica_id]
        self._own_load.add(replica_id, LoadReport(total_blocks=member.total_blocks))  # until it is heard
        if member.address is not None:
            self._feeds.listen(replica_id, member.address)

    def _drop(self, replica_id: str) -> None:
        self._feeds.forget(replica_id)
        self._heard.discard(replica_id)
        self._reports.pop(replica_id, None)
        self._own_load.remove(replica_id)
        if self._router is not None and replica_id in self._router.fleet:
            self._router.remove(replica_id)

    # News of replicas

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        """Note changes of what a replica holds, in their order; blocks of another size say nothing here."""
        router = self._router
        if router is not None and replica_id in router.fleet and self._members.fits(replica_id):
            router.apply(replica_id, events)
            for event in events:
                self._misses.apply(event)

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        """Note a replica's load."""
        router = self._router
        if router is None or replica_id not in router.fleet:
            return
        if not self._members.fits(replica_id):
            report = rescaled(report, self._members.size(replica_id) / router.tokens_per_block)
        self._reports[replica_id] = report
        router.report(replica_id, report, self._clock(), new_epoch=new_epoch)

    def connected(self, replica_id: str) -> None:
        """A replica is heard."""
        if replica_id in self._members:
            self._heard.add(replica_id)
            self._own_load.remove(replica_id)

    def lost(self, replica_id: str) -> None:
        """A replica is not heard any more, though it may work."""
        if replica_id in self._members:
            self._heard.discard(replica_id)
            self._own_load.add(replica_id, self._reports.get(replica_id, LoadReport()))

    # Sequences

    def open(self, trace: RouteTrace) -> None:
        """A sequence is about to be routed; `close` has to follow."""
        self._open[trace.sequence_id] = trace

    def choose(self, request: GenerateRequest, refused_by: str = "") -> Choice | None:
        """Rank the replicas for a sequence, and count it as on its way to the first; None if no replica is known.

        Args:
            request: The sequence; chosen for before, perhaps.
            refused_by: Who did not take it last time; empty: nobody was asked.
        """
        started_s = time.perf_counter()
        router = self._router
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
        router.commit(route, decision, now_s)
        trace.decided(router, decision, now_s)
        self.counts.count_decision(trace, time.perf_counter() - started_s)
        return Choice(decision.ranked, _expecting(request, trace.expected_tokens))

    def preview(self, request: GenerateRequest, trace: RouteTrace) -> None:
        """Note in `trace` where the sequence would go; changes nothing else."""
        router = self._router
        if router is None:
            return
        route = self._make_route(trace, router, request)
        decision = router.preview(route, self._clock())
        if decision is not None:
            trace.decided(router, decision, self._clock())

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
            self._report_own(replica_id, self._own_load.accepted(trace))

    def _move(self, trace: RouteTrace, replica_id: str) -> None:
        """Count a sequence where it is, if that is not the first choice: Serve found that one full."""
        router, decision, route = trace.router, trace.decision, trace.route
        if router is None or router is not self._router or decision is None or route is None or trace.first_s:
            return
        candidates = decision.view.replica_ids
        if decision.replica_id != replica_id and replica_id in candidates and replica_id in router.fleet:
            router.recall(trace.route_id)
            router.commit(route, decision, self._clock(), replica_id)

    def _explain_misses(self, trace: RouteTrace, replica_id: str) -> None:
        decision, prompt = trace.decision, trace.prompt
        if decision is None or prompt is None or replica_id not in decision.view.replica_ids:
            return
        hits = decision.match.hit_blocks
        hit = int(hits[decision.view.replica_ids.index(replica_id)])
        blocks = prompt.reusable()
        trace.misses = self._misses.explain(blocks, hit, int(hits.max()))
        self._misses.sent(blocks)
        self.counts.count_misses(trace)

    def began(self, trace: RouteTrace) -> None:
        """The first token of a sequence has come; from now on its replica's reports cover it."""
        self.accepted(trace.sequence_id, trace.replica_id)  # Serve's news of it may be slower than the token
        self._settle(trace)
        self._report_own(trace.replica_id, self._own_load.began(trace))
        self.counts.count_first_token(trace)

    def close(self, trace: RouteTrace) -> None:
        """A sequence has ended, or will never begin."""
        self._open.pop(trace.sequence_id, None)
        self._settle(trace)
        self._report_own(trace.replica_id, self._own_load.ended(trace))
        trace.forget_prompt()

    def _settle(self, trace: RouteTrace) -> None:
        if trace.router is not None:
            trace.router.settle(trace.route_id)

    def _report_own(self, replica_id: str, report: LoadReport | None) -> None:
        router = self._router
        if report is not None and router is not None and replica_id in router.fleet:
            router.report(replica_id, report, self._clock())

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
        trace.prompt = self._hasher.hashed(request)
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

    @property
    def fairness(self) -> FairnessSettings:
        """How sequences wait while no replica has room."""
        return self._settings.fairness

    def view(self) -> FleetView | None:
        """Return the state of all replicas; None before the first."""
        return self._router.fleet.view(self._clock()) if self._router is not None else None

    def best_hit_tokens(self, request: GenerateRequest, trace: RouteTrace) -> int:
        """Return how many prompt tokens the replica holds that holds most."""
        router = self._router
        if router is None:
            return 0
        decision = router.preview(self._make_route(trace, router, request), self._clock())
        return int(decision.match.hit_blocks.max()) * router.tokens_per_block if decision is not None else 0

    # What is known, for metrics and people

    @property
    def heard(self) -> PlaneCounts:
        """What has come from replicas."""
        return self._feeds.counts

    @property
    def tokens_per_block(self) -> int:
        """Of the replicas' KV caches; 0 before the first replica."""
        return self._router.tokens_per_block if self._router is not None else 0

    @property
    def index_blocks(self) -> int:
        """Blocks in the prefix index."""
        return len(self._router.index) if self._router is not None else 0

    @property
    def replicas_heard(self) -> tuple[int, int]:
        """How many replicas are heard, and how many are not."""
        return len(self._heard), len(self._members) - len(self._heard)

    def shut(self) -> None:
        """Stop hearing replicas."""
        self._feeds.close()


def _expecting(request: GenerateRequest, tokens: int) -> GenerateRequest:
    if request.expected_cached_tokens == tokens:
        return request
    return msgspec.structs.replace(request, expected_cached_tokens=tokens)
