"""Roster: the replicas of one model, as Ray Serve lists them and as they are heard. Keeps the decision core up to date.

It belongs to one event loop and never waits. What hears the replicas (`serve.router.subscriber`) says what they say.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from serve.core.kv_events import KvEvent
from serve.core.routing.load import LoadReport
from serve.core.routing.miss_reasons import MissHistory
from serve.core.routing.router import Router
from serve.core.routing.settings import RoutingSettings, make_policy
from serve.router.membership import Membership, rescaled
from serve.router.own_load import OwnLoad
from serve.router.prompt_hasher import PromptHasher
from serve.router.replica_feed import PlaneCounts
from serve.router.trace import RouteTrace
from serve.router.wire import PlaneAddress

logger = logging.getLogger(__name__)


class Feeds(Protocol):
    """Hears replicas: what they hold and how busy they are. Tells the roster that it was made for.

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


class Roster:
    """Replicas of one model.

    Args:
        model: Its id, for the log.
        settings: Section `routing` of its configuration.
        make_feeds: Makes what hears its replicas; called once, with the roster.
        clock: In seconds; monotonic.

    Attributes:
        router: Decides among them; None before the first. Another one takes its place when the size of blocks changes.
        hasher: Hashes prompts as the router needs them.
        misses: What the replicas have held at some time.
        feeds: What hears them.
    """

    def __init__(
        self,
        model: str,
        settings: RoutingSettings,
        make_feeds: Callable[["Roster"], Feeds],
        clock: Callable[[], float],
    ) -> None:
        self.router: Router | None = None
        self.hasher = PromptHasher(1)
        self.misses = MissHistory()
        self.feeds = make_feeds(self)
        self._model = model
        self._settings = settings
        self._clock = clock
        self._members = Membership()
        self._heard: set[str] = set()
        self._reports: dict[str, LoadReport] = {}
        self._own_load = OwnLoad()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def heard(self) -> int:
        """How many replicas are heard."""
        return len(self._heard)

    # Who runs

    def update(self, replicas: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in which replicas run.

        Args:
            replicas: Id to what the replica said of itself when it started (`record_replica_metadata`).
        """
        added, removed = self._members.update(replicas)
        for replica_id in removed:
            self._drop(replica_id)
        router, size = self.router, self._members.tokens_per_block
        if size and (router is None or router.tokens_per_block != size):
            router, added = self._start_router(size), list(self._members)
        for replica_id in added:
            if router is not None:
                router.add(replica_id, self._clock())
            self._listen(replica_id)

    def died(self, replica_id: str) -> None:
        """Forget a replica at once; it stays forgotten, even if Serve's controller still lists it for a while."""
        if self._members.bury(replica_id):
            self._drop(replica_id)

    def _start_router(self, size: int) -> Router:
        """Begin with an empty index, of blocks as most replicas have them."""
        if self.router is not None:
            logger.info("%s: replicas have blocks of %d tokens now; the prefix index starts anew.", self._model, size)
            for replica_id in self._members:
                self.feeds.forget(replica_id)  # and heard again, it sends a snapshot
        self.router = Router(make_policy(self._settings), size, max_index_blocks=self._settings.max_index_blocks)
        self.hasher = PromptHasher(size)
        return self.router

    def _listen(self, replica_id: str) -> None:
        member = self._members[replica_id]
        self._own_load.add(replica_id, LoadReport(total_blocks=member.total_blocks))  # until it is heard
        if member.address is not None:
            self.feeds.listen(replica_id, member.address)

    def _drop(self, replica_id: str) -> None:
        self.feeds.forget(replica_id)
        self._heard.discard(replica_id)
        self._reports.pop(replica_id, None)
        self._own_load.remove(replica_id)
        if self.router is not None and replica_id in self.router.fleet:
            self.router.remove(replica_id)

    # What they say

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        """Note changes of what a replica holds, in their order; blocks of another size say nothing here."""
        router = self.router
        if router is not None and replica_id in router.fleet and self._members.fits(replica_id):
            router.apply(replica_id, events)
            for event in events:
                self.misses.apply(event)

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        """Note a replica's load."""
        router = self.router
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

    # What this gateway has there: all that is known of the load of those that say nothing

    def has(self, trace: RouteTrace) -> None:
        """A replica has taken a sequence, which has just arrived there or got its first token."""
        self._report_own(trace.replica_id, self._own_load.has(trace))

    def ended(self, trace: RouteTrace) -> None:
        """A sequence has ended, wherever it was."""
        self._report_own(trace.replica_id, self._own_load.ended(trace))

    def _report_own(self, replica_id: str, report: LoadReport | None) -> None:
        router = self.router
        if report is not None and router is not None and replica_id in router.fleet:
            # Not from the replica: what is believed of its cache grows no younger by it.
            router.report(replica_id, report, self._clock(), heard=False)
