"""simulate: a workload through gateways and replicas in virtual time, with production's decisions.

Discrete events: an arrival, a message that reaches a replica or comes back refused, the end of an engine's step or run
of steps. What replicas publish is no event: it waits until a gateway decides (`sim.gateway`).
"""

import math
import random
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

from serve.core.blocks import ROOT
from serve.core.routing.policy import Policy
from serve.core.routing.request import RouteRequest
from serve.engines.simulated.settings import SimulatedSettings
from serve.engines.simulated.timeline import Progress
from sim.gateway import News, SimGateway
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.publication import Publication
from sim.replica import SimReplica, SimSequence
from sim.workload import SimRequest

_ENGINE, _ARRIVE, _REFUSED = 0, 1, 2
_REPORT_EVERY = 256  # arrivals between two calls of the progress callback

ProgressCallback = Callable[[int, float], None]


def simulate(
    requests: Sequence[SimRequest],
    engines: Sequence[SimulatedSettings],
    policy: Policy,
    options: SimOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> Outcome:
    """Serve a workload.

    Args:
        requests: By arrival; hashes are of the engines' block size.
        engines: One for each replica; all have the same `tokens_per_block`.
        policy: Decides for every gateway.
        options: What surrounds the engines.
        on_progress: Called now and then with requests that have arrived and the virtual time.

    Raises:
        ValueError: There is no engine, or their block sizes differ.
    """
    return _Simulation(requests, engines, policy, options or SimOptions()).run(on_progress)


class _Simulation:
    def __init__(
        self, requests: Sequence[SimRequest], engines: Sequence[SimulatedSettings], policy: Policy, options: SimOptions
    ) -> None:
        sizes = sorted({engine.tokens_per_block for engine in engines})
        if len(sizes) != 1:
            raise ValueError(
                f"the engines have tokens_per_block={sizes}: there must be one size, and one engine or more"
            )
        self._requests = requests
        self._options = options
        self._rng = random.Random(options.seed)
        self._replicas = [SimReplica(i, engine, options.publish_interval_s) for i, engine in enumerate(engines)]
        names = [replica.name for replica in self._replicas]
        self._number_of = {name: number for number, name in enumerate(names)}
        self._gateways = [
            SimGateway(policy, names, sizes[0], options.max_index_blocks, options.seed + number)
            for number in range(options.gateways)
        ]
        self._news = News(self._gateways, names, options)
        self._heap: list[tuple[float, int, int, object]] = []
        self._serial = 0
        self._max_tokens = options.max_tokens or max((request.output_tokens for request in requests), default=0)
        # Per request
        count = len(requests)
        self._gateway_of = [self._rng.randrange(options.gateways) for _ in range(count)]
        self._first_token_s = [math.nan] * count
        self._end_s = [math.nan] * count
        self._queue_s = [math.nan] * count
        self._predicted_s = [math.nan] * count
        self._cached = [0] * count
        self._replica = [-1] * count
        self._attempts = [0] * count

    def run(self, on_progress: ProgressCallback | None) -> Outcome:
        heap, requests = self._heap, self._requests
        arrived, count = 0, len(requests)
        now_s = 0.0
        while arrived < count or heap:
            if arrived < count and (not heap or requests[arrived].arrival_s < heap[0][0]):
                now_s = requests[arrived].arrival_s
                self._route(arrived, now_s, frozenset())
                arrived += 1
                if on_progress is not None and arrived % _REPORT_EVERY == 0:
                    on_progress(arrived, now_s)
                continue
            now_s, _, kind, subject = heappop(heap)
            if kind == _ENGINE:
                assert isinstance(subject, SimReplica)
                self._advance(subject, now_s)
            elif kind == _ARRIVE:
                assert isinstance(subject, _Attempt)
                self._arrive(subject, now_s)
            else:
                assert isinstance(subject, _Attempt)
                self._refused(subject, now_s)
        if on_progress is not None:
            on_progress(count, now_s)
        return self._outcome()

    # A request on its way

    def _route(self, number: int, now_s: float, retried: frozenset[str]) -> None:
        request = self._requests[number]
        max_tokens = self._limit(request)
        if not any(replica.fits(request.prompt_tokens, max_tokens) for replica in self._replicas[:1]):
            return
        gateway = self._gateways[self._gateway_of[number]]
        self._news.deliver(now_s)
        gateway.see_first_tokens(now_s)
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
        assert decision is not None
        name = decision.replica_id
        gateway.router.commit(route, decision, now_s)
        self._attempts[number] += 1
        chosen = int(decision.order[0])
        if decision.scores.predicted_ttft_s is not None:
            self._predicted_s[number] = float(decision.scores.predicted_ttft_s[chosen])
        expected = request.prompt_tokens - gateway.router.expected_hit_tokens(decision, name)
        attempt = _Attempt(number, self._replicas[self._number_of[name]], max_tokens, expected, retried)
        self._push(now_s + self._options.delay_s, _ARRIVE, attempt)

    def _limit(self, request: SimRequest) -> int:
        room = self._replicas[0].context_tokens - request.prompt_tokens
        return max(request.output_tokens, min(request.max_tokens or self._max_tokens, room))

    def _arrive(self, attempt: "_Attempt", now_s: float) -> None:
        replica, request = attempt.replica, self._requests[attempt.number]
        if replica.is_full:
            self._push(now_s + self._options.delay_s, _REFUSED, attempt)
            return
        sequence = SimSequence(
            "",
            request.prompt_tokens,
            list(request.hashes),
            root=ROOT,
            max_tokens=attempt.max_tokens,
            output_tokens=request.output_tokens,
        )
        sequence.number = sequence.route_id = attempt.number
        sequence.expected_tokens = attempt.expected_tokens
        if request.output_hashes:
            first, output_hashes = len(request.hashes), request.output_hashes
            sequence.next_hash = lambda block: output_hashes[block - first]
        self._replica[attempt.number] = replica.number
        self._publish(replica.submit(sequence, now_s))
        self._push_engine(replica)

    def _refused(self, attempt: "_Attempt", now_s: float) -> None:
        router = self._gateways[self._gateway_of[attempt.number]].router
        retried = attempt.retried | {attempt.replica.name}
        if len(retried) >= min(len(self._replicas), self._options.max_attempts):
            router.settle(attempt.number)
            return
        router.recall(attempt.number)
        self._route(attempt.number, now_s, retried)

    # Engines

    def _advance(self, replica: SimReplica, now_s: float) -> None:
        progress, publication = replica.advance(now_s)
        self._publish(publication)
        if progress:
            self._push_engine(replica)
        for moment in progress:
            self._note(moment)

    def _note(self, moment: Progress[SimSequence]) -> None:
        delay_s = self._options.delay_s
        for sequence in moment.prefilled:
            if sequence.first_token_s == moment.at_s:
                number = sequence.number
                self._first_token_s[number] = moment.at_s + delay_s
                self._queue_s[number] = sequence.started_s - sequence.arrived_s
                self._cached[number] = sequence.cached_tokens
                self._gateways[self._gateway_of[number]].expect_first_token(moment.at_s + delay_s, number)
        for sequence in moment.finished:
            self._end_s[sequence.number] = moment.at_s + delay_s

    def _push_engine(self, replica: SimReplica) -> None:
        if replica.next_s < math.inf:
            self._push(replica.next_s, _ENGINE, replica)

    def _publish(self, publication: Publication | None) -> None:
        if publication is not None:
            self._news.send(publication)

    def _push(self, at_s: float, kind: int, subject: object) -> None:
        self._serial += 1
        heappush(self._heap, (at_s, self._serial, kind, subject))

    def _outcome(self) -> Outcome:
        requests, replicas = self._requests, self._replicas
        end_s = np.array(self._end_s)
        return Outcome(
            arrival_s=np.array([request.arrival_s for request in requests]),
            first_token_s=np.array(self._first_token_s),
            end_s=end_s,
            queue_s=np.array(self._queue_s),
            prompt_tokens=np.array([request.prompt_tokens for request in requests], dtype=np.int64),
            cached_tokens=np.array(self._cached, dtype=np.int64),
            output_tokens=np.array([request.output_tokens for request in requests], dtype=np.int64),
            predicted_ttft_s=np.array(self._predicted_s),
            replica=np.array(self._replica, dtype=np.int64),
            attempts=np.array(self._attempts, dtype=np.int64),
            busy_s=np.array([replica.timeline.busy_s for replica in replicas]),
            steps=np.array([replica.timeline.steps for replica in replicas], dtype=np.int64),
            end_of_all_s=float(np.nanmax(end_s)) if np.isfinite(end_s).any() else 0.0,
        )


class _Attempt:
    """A request on its way to one replica."""

    __slots__ = ("expected_tokens", "max_tokens", "number", "replica", "retried")

    def __init__(
        self, number: int, replica: SimReplica, max_tokens: int, expected_tokens: int, retried: frozenset[str]
    ) -> None:
        self.number = number
        self.replica = replica
        self.max_tokens = max_tokens
        self.expected_tokens = expected_tokens
        self.retried = retried
