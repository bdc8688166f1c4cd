"""simulate: a workload through gateways and replicas in virtual time, with production's decisions.

Discrete events: an arrival, a message that reaches a replica or comes back refused, the end of an engine's step or run
of steps. What replicas publish is no event: it waits until a gateway decides (`sim.gateway`).
"""

import math
import random
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from serve.core.blocks import ROOT
from serve.core.routing.policy import Policy
from serve.core.routing.request import RouteRequest
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.simulated.timeline import Progress
from sim.gate import Turn
from sim.gateway import News, SimGateway
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.records import Records
from sim.replica import SimReplica, SimSequence, replica_name
from sim.workload import SimRequest

_REPORT_EVERY = 256  # arrivals between two calls of the progress callback

ProgressCallback = Callable[[int, float], None]


def simulate(
    requests: Sequence[SimRequest],
    engines: Sequence[SimulatedSettings],
    policy: Policy,
    options: SimOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> Outcome:
    """Serve a workload. The same arguments give the same outcome.

    Args:
        requests: By arrival; hashes are of the engines' block size.
        engines: One for each replica; all have the same `tokens_per_block`.
        policy: Decides for every gateway.
        options: What surrounds the engines.
        on_progress: Called now and then with requests that have arrived and the virtual time.

    Raises:
        ValueError: There is no engine, or their block sizes differ.
    """
    return Simulation(requests, engines, policy, options or SimOptions()).run(on_progress)


class _Attempt(NamedTuple):
    """A request on its way to one replica."""

    number: int
    replica: SimReplica
    max_tokens: int
    expected_tokens: int
    retried: frozenset[str]


class Simulation:
    """One run of a workload; `run` once.

    Args:
        requests, engines, policy, options: As of `simulate`.

    Attributes:
        replicas, gateways: The fleet.
        news: What is on its way between them.
    """

    def __init__(
        self, requests: Sequence[SimRequest], engines: Sequence[SimulatedSettings], policy: Policy, options: SimOptions
    ) -> None:
        sizes = sorted({engine.tokens_per_block for engine in engines})
        if len(sizes) != 1:
            raise ValueError(
                f"the engines have tokens_per_block={sizes}: there must be one size, and one engine or more"
            )
        names = [replica_name(number) for number in range(len(engines))]
        self.gateways = [
            SimGateway(policy, names, sizes[0], options, options.seed + number) for number in range(options.gateways)
        ]
        self.news = News(self.gateways, names, options)
        self.replicas = [SimReplica(number, engine, options, self.news.send) for number, engine in enumerate(engines)]
        self._kinds = list({(r.context_tokens, r.limits): r for r in self.replicas}.values())
        self._by_name = {replica.name: replica for replica in self.replicas}
        self._requests = requests
        self._records = Records(requests)
        self._options = options
        self._max_tokens = options.max_tokens or max((request.output_tokens for request in requests), default=0)
        rng = random.Random(options.seed)
        self._gateway_of = [self.gateways[rng.randrange(options.gateways)] for _ in requests]
        # (when, serial, what to call with the subject and the time, subject)
        self._events: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._serial = 0

    def run(self, on_progress: ProgressCallback | None = None) -> Outcome:
        """Serve every request; returns what became of them."""
        events, requests, count = self._events, self._requests, len(self._requests)
        arrived, now_s = 0, 0.0
        while arrived < count or events:
            if arrived == count or (events and events[0][0] <= requests[arrived].arrival_s):
                now_s, _, happen, subject = heappop(events)
                happen(subject, now_s)
                continue
            now_s = requests[arrived].arrival_s
            self._enter(arrived, now_s)
            arrived += 1
            if on_progress is not None and arrived % _REPORT_EVERY == 0:
                on_progress(arrived, now_s)
        if on_progress is not None:
            on_progress(count, now_s)
        return self._records.outcome(self.replicas)

    # A request on its way

    def _enter(self, number: int, now_s: float) -> None:
        request, gateway = self._requests[number], self._gateway_of[number]
        max_tokens = self._limit(request)
        if not any(replica.fits(request.prompt_tokens, max_tokens) for replica in self._kinds):
            return  # production's gateway answers that the context is too long
        self._hear(gateway, now_s)
        self._let_go(gateway.gate.enter(number, request, max_tokens, now_s), now_s)
        self._look_later(gateway, now_s)

    def _look_on(self, gateway: SimGateway, now_s: float) -> None:
        gateway.looks = False
        self._hear(gateway, now_s)
        self._let_go(gateway.gate.look_on(now_s), now_s)
        self._look_later(gateway, now_s)

    def _look_later(self, gateway: SimGateway, now_s: float) -> None:
        if not gateway.looks and not gateway.gate.is_empty:
            gateway.looks = True
            self._after(now_s + self._options.look_interval_s, self._look_on, gateway)

    def _let_go(self, turn: Turn, now_s: float) -> None:
        for number in turn.go:
            self._records.waited(number, now_s - self._requests[number].arrival_s)
            self._route(number, now_s, frozenset())

    def _hear(self, gateway: SimGateway, now_s: float) -> None:
        self.news.deliver(now_s)
        gateway.catch_up(now_s)

    def _route(self, number: int, now_s: float, retried: frozenset[str]) -> None:
        request, gateway = self._requests[number], self._gateway_of[number]
        max_tokens = self._limit(request)
        route = RouteRequest(
            number,
            request.hashes,
            request.prompt_tokens,
            max_tokens,
            request.session,
            request.lora,
            request.tenant,
            retried,
        )
        decision = gateway.router.route(route, now_s)
        assert decision is not None  # every replica is known from the begin
        gateway.router.commit(route, decision, now_s)
        self._records.attempts[number] += 1
        if decision.scores.predicted_ttft_s is not None:
            self._records.predicted_s[number] = float(decision.scores.predicted_ttft_s[decision.order[0]])
        expected = request.prompt_tokens - gateway.router.expected_hit_tokens(decision, decision.replica_id)
        attempt = _Attempt(number, self._by_name[decision.replica_id], max_tokens, expected, retried)
        self._after(now_s + self._options.delay_s, self._arrive, attempt)

    def _limit(self, request: SimRequest) -> int:
        """Return the output limit that reaches the engine: within its context, as a gateway makes it."""
        room = max(replica.context_tokens for replica in self._kinds) - request.prompt_tokens
        return max(request.output_tokens, min(request.max_tokens or self._max_tokens, room))

    def _arrive(self, attempt: _Attempt, now_s: float) -> None:
        number, replica, request = attempt.number, attempt.replica, self._requests[attempt.number]
        if replica.is_full or not replica.fits(request.prompt_tokens, attempt.max_tokens):
            self._after(now_s + self._options.delay_s, self._refused, attempt)
            return
        sequence = SimSequence(
            "",
            request.prompt_tokens,
            list(request.hashes),
            root=ROOT,
            max_tokens=attempt.max_tokens,
            output_tokens=request.output_tokens,
        )
        sequence.number = sequence.route_id = number
        sequence.expected_tokens = attempt.expected_tokens
        if request.output_hashes:
            first, output_hashes = len(request.hashes), request.output_hashes
            sequence.next_hash = lambda block: output_hashes[block - first]
        self._records.replica[number] = replica.number
        replica.submit(sequence, now_s)
        self._await(replica)

    def _refused(self, attempt: _Attempt, now_s: float) -> None:
        router = self._gateway_of[attempt.number].router
        retried = attempt.retried | {attempt.replica.name}
        if len(retried) >= min(len(self.replicas), self._options.max_attempts):
            router.settle(attempt.number)
            return
        router.recall(attempt.number)
        self._hear(self._gateway_of[attempt.number], now_s)
        self._route(attempt.number, now_s, retried)

    # Engines

    def _advance(self, replica: SimReplica, now_s: float) -> None:
        progress = replica.advance(now_s)
        if progress:  # else a sequence has arrived since, and what was due comes earlier or later
            self._await(replica)
        for moment in progress:
            self._see(moment, moment.at_s + self._options.delay_s)

    def _see(self, moment: Progress[SimSequence], seen_s: float) -> None:
        for sequence in moment.prefilled:
            if sequence.first_token_s == moment.at_s:  # not one that was preempted, and computed again
                self._records.first_token(sequence, seen_s)
                self._gateway_of[sequence.number].expect_first_token(seen_s, sequence.route_id)
        for sequence in moment.finished:
            number = sequence.number
            self._records.end(sequence, seen_s)
            self._gateway_of[number].gate.end(number, self._requests[number], sequence.cached_tokens)

    def _await(self, replica: SimReplica) -> None:
        if replica.next_s < math.inf:
            self._after(replica.next_s, self._advance, replica)

    def _after(self, at_s: float, happen: Callable[[Any, float], None], subject: Any) -> None:
        self._serial += 1
        heappush(self._events, (at_s, self._serial, happen, subject))
