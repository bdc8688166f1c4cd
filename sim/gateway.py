"""SimGateway and News: the production router, fed with what replicas say, as late as the network brings it.

Nothing looks at a gateway's state but its own decisions, so news wait until the next decision; and of several reports
of one replica only the last is taken in, because it holds the totals of those before.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

from serve.core.kv_events import KvEvent
from serve.core.routing.load import LoadReport
from serve.core.routing.policy import Policy
from serve.core.routing.router import Router
from sim.options import SimOptions
from sim.publication import Publication


class SimGateway:
    """One gateway process: a router, and its requests that wait for their first token.

    Args:
        policy: What decides.
        names: The replicas, all known from the begin.
        tokens_per_block: Of their caches.
        max_index_blocks: Cap of the prefix index.
        seed: Of its draws.
    """

    def __init__(
        self, policy: Policy, names: Sequence[str], tokens_per_block: int, max_index_blocks: int, seed: int
    ) -> None:
        self.router = Router(policy, tokens_per_block, max_index_blocks=max_index_blocks, seed=seed)
        self._first_tokens: list[tuple[float, int]] = []  # (when the gateway sees it, route id)
        for name in names:
            self.router.add(name, 0.0)

    def expect_first_token(self, at_s: float, route_id: int) -> None:
        """Let the gateway see a request's first token at `at_s`."""
        heappush(self._first_tokens, (at_s, route_id))

    def hear(self, name: str, events: Sequence[KvEvent], report: LoadReport, now_s: float) -> None:
        """Take in what a replica has sent."""
        if events:
            self.router.apply(name, events)
        self.router.report(name, report, now_s)

    def see_first_tokens(self, now_s: float) -> None:
        """Settle the requests whose first token has come."""
        first_tokens = self._first_tokens
        while first_tokens and first_tokens[0][0] <= now_s:
            self.router.settle(heappop(first_tokens)[1])


class News:
    """Publications on their way to all gateways.

    Args:
        gateways: Who hears them.
        names: The replicas.
        options: Delay and intervals.
    """

    def __init__(self, gateways: Sequence[SimGateway], names: Sequence[str], options: SimOptions) -> None:
        self._gateways = gateways
        self._names = names
        self._delay_s = options.delay_s
        self._interval_s = options.publish_interval_s
        self._progress_s = options.progress_interval_s
        self._due: list[tuple[float, int, Publication]] = []  # (when to look at it, serial, what)
        self._serial = 0
        self._latest: dict[int, Publication] = {}  # what was heard last of each replica

    def send(self, publication: Publication) -> None:
        """Put a publication on its way."""
        self._push(publication.at_s + self._delay_s, publication)

    def deliver(self, now_s: float) -> None:
        """Let all gateways hear what reaches them by `now_s`."""
        due = self._due
        arrived: dict[int, list[Publication]] = {}
        while due and due[0][0] <= now_s:
            publication = heappop(due)[2]
            replica = publication.replica
            if not publication.is_sent:
                publication.is_sent = True
                arrived.setdefault(replica, []).append(publication)
                self._latest[replica] = publication
            elif self._latest[replica] is publication:  # else there is a newer one
                arrived.setdefault(replica, [])
        for replica, publications in arrived.items():
            self._tell(self._latest[replica], publications, now_s)
        for gateway in self._gateways:
            gateway.router.fleet.all_alive(now_s)

    def _tell(self, latest: Publication, publications: list[Publication], now_s: float) -> None:
        sent_s = latest.at_s
        if latest.goes_on:
            # While it decodes, a replica has sent a report each interval.
            sent_s += max(0.0, now_s - self._delay_s - sent_s) // self._interval_s * self._interval_s
            self._push(sent_s + self._delay_s + self._progress_s, latest)
        events = [event for publication in publications for event in publication.events]
        accepted = tuple(route_id for publication in publications for route_id in publication.accepted)
        report = latest.report(sent_s, accepted)
        for gateway in self._gateways:
            gateway.hear(self._names[latest.replica], events, report, sent_s + self._delay_s)

    def _push(self, at_s: float, publication: Publication) -> None:
        self._serial += 1
        heappush(self._due, (at_s, self._serial, publication))
