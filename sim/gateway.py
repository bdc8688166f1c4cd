"""SimGateway and News: the production router, fed with what replicas say, as late as the network brings it.

Nothing looks at a gateway's state but its own decisions, so news wait until the next decision; and of several reports
of one replica only the last is taken in, because it holds the totals of those before.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

from serve.core.kv_events import KvEvent
from serve.core.routing.policy import Policy
from serve.core.routing.router import Router
from sim.gate import SimGate
from sim.options import SimOptions
from sim.publication import KvMessage, LoadMessage, Message


class SimGateway:
    """One gateway process: a router, a queue, and its requests that wait for their first token.

    Args:
        policy: What decides.
        names: The replicas, all known from the begin.
        tokens_per_block: Of their caches.
        options: Size of the prefix index, and rules of the queue.
        seed: Of its draws.

    Attributes:
        router, gate: Its parts.
        looks: Whether it will look for room for those that wait.
    """

    def __init__(
        self, policy: Policy, names: Sequence[str], tokens_per_block: int, options: SimOptions, seed: int
    ) -> None:
        self.router = Router(policy, tokens_per_block, max_index_blocks=options.max_index_blocks, seed=seed)
        self.gate = SimGate(options.fairness, self.router)
        self.looks = False
        self._first_tokens: list[tuple[float, int]] = []  # (when the gateway sees it, route id)
        for name in names:
            self.router.add(name, 0.0)

    def expect_first_token(self, at_s: float, route_id: int) -> None:
        """Let the gateway see a request's first token at `at_s`."""
        heappush(self._first_tokens, (at_s, route_id))

    def catch_up(self, now_s: float) -> None:
        """Settle the requests whose first token has come; and take it that every replica has sent its heartbeat."""
        self.router.fleet.all_alive(now_s)
        first_tokens = self._first_tokens
        while first_tokens and first_tokens[0][0] <= now_s:
            self.router.settle(heappop(first_tokens)[1])


class News:
    """Messages of the replicas on their way to all gateways.

    Args:
        gateways: Who hears them.
        names: The replicas.
        options: Delay and intervals.
    """

    def __init__(self, gateways: Sequence[SimGateway], names: Sequence[str], options: SimOptions) -> None:
        self._gateways = gateways
        self._names = names
        self._delay_s = options.delay_s
        self._progress_s = options.progress_interval_s
        self._due: list[tuple[float, int, Message]] = []  # (when to look at it, serial, what)
        self._serial = 0
        self._latest: dict[int, LoadMessage] = {}  # what was heard last of each replica's load

    def send(self, message: Message) -> None:
        """Put a message on its way."""
        self._push(message.at_s + self._delay_s, message)

    def deliver(self, now_s: float) -> None:
        """Let all gateways hear what reaches them by `now_s`."""
        due = self._due
        events: dict[int, list[KvEvent]] = {}
        accepted: dict[int, list[int]] = {}
        while due and due[0][0] <= now_s:
            message = heappop(due)[2]
            replica = message.replica
            if isinstance(message, KvMessage):
                message.is_sent = True
                events.setdefault(replica, []).extend(message.events)
            elif not message.is_sent:
                message.is_sent = True
                accepted.setdefault(replica, []).extend(message.accepted)
                self._latest[replica] = message
            elif self._latest[replica] is message:  # else there is a newer one
                accepted.setdefault(replica, [])
        for replica, changes in events.items():
            for gateway in self._gateways:
                gateway.router.apply(self._names[replica], changes)
        for replica, route_ids in accepted.items():
            self._report(self._latest[replica], tuple(route_ids), now_s)

    def _report(self, latest: LoadMessage, accepted: tuple[int, ...], now_s: float) -> None:
        sent_s = latest.at_s
        if latest.goes_on:
            sent_s += max(0.0, now_s - self._delay_s - sent_s) // self._progress_s * self._progress_s
            self._push(sent_s + self._progress_s + self._delay_s, latest)
        report = latest.report(sent_s, accepted)
        for gateway in self._gateways:
            gateway.router.report(self._names[latest.replica], report, sent_s + self._delay_s)

    def _push(self, at_s: float, message: Message) -> None:
        self._serial += 1
        heappush(self._due, (at_s, self._serial, message))
