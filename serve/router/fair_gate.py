"""FairGate: where sequences of one model wait in this gateway while no replica has room.

Wires `serve.core.routing.admission` to the event loop; decides nothing.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from serve import telemetry
from serve.core.fair_queue import Waiting, request_cost
from serve.core.histogram import Histogram
from serve.core.request import GenerateRequest
from serve.core.routing.admission import Admission
from serve.core.routing.fairness import FairnessSettings
from serve.core.top_labels import TopLabels
from serve.errors import Overloaded
from serve.router.board import RoutingBoard
from serve.router.counts import DEFAULT_TENANT
from serve.router.trace import RouteTrace

# How often to look for room while somebody waits. Engines have `full_waiting` requests in reserve meanwhile.
_LOOK_EVERY_S = 0.01


class _Place(NamedTuple):
    """Where a sequence waits.

    Attributes:
        turn: Resolved when it may go, failed when it has to.
        trace: The sequence.
        label: Of its tenant, in metrics.
    """

    turn: asyncio.Future[None]
    trace: RouteTrace
    label: str


class FairGate:
    """Lets sequences through at once while there is room, and in turn when there is not. One event loop uses it.

    Args:
        board: Knows the replicas.
        settings: Section `fairness` of the model's routing.
        clock: `time.monotonic`, or what a test has instead.

    Attributes:
        waited_s: How long those waited that were let through after waiting.
        turned_away: Sequences that were not let through, by reason: `full`, `too_long`.
    """

    def __init__(
        self, board: RoutingBoard, settings: FairnessSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.waited_s = Histogram(telemetry.ROUTING_QUEUE_WAIT.buckets)
        self.turned_away: Counter[str] = Counter()
        self._board = board
        self._settings = settings
        self._clock = clock
        self._admission = Admission(settings)
        self._places: dict[int, _Place] = {}
        self._on_the_way: list[RouteTrace] = []  # let through, and perhaps not counted by the board yet
        self._charged: dict[str, float] = {}  # cost of those that have waited and were let through, by sequence
        self._numbers = itertools.count()
        self._labels = TopLabels()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, trace: RouteTrace, request: GenerateRequest) -> None:
        """Return when a sequence may be sent to a replica; `leave` has to follow, however this ends.

        Raises:
            Overloaded: Too many wait, or it has waited too long.
        """
        now_s = self._clock()
        if self._admission.unrivalled(trace.hints.tenant, trace.hints.priority, now_s):
            return
        if not self._admission.passes(now_s):
            self._look(trace.prompt_tokens)
            if not self._admission.passes(now_s):
                await self._wait(trace, request, now_s)
                return
        self._on_the_way.append(trace)

    def leave(self, trace: RouteTrace) -> None:
        """A sequence has ended, or will never be sent."""
        charged = self._charged.pop(trace.sequence_id, None)
        if charged is not None:
            cost = 0.0  # it never reached a replica
            if trace.routed_s:
                cached = trace.prefill.cached_tokens if trace.prefill is not None else trace.expected_tokens
                cost = self._cost(trace, cached, trace.output_tokens)
            self._admission.queue.correct(_tenant(trace), cost - charged)
        if self._places:
            self._look_on()

    def queued(self) -> Counter[str]:
        """Return how many sequences wait, by the label of their tenant."""
        return Counter(place.label for place in self._places.values())

    # Waiting

    async def _wait(self, trace: RouteTrace, request: GenerateRequest, now_s: float) -> None:
        number, tenant = next(self._numbers), _tenant(trace)
        output_tokens = min(trace.max_tokens, self._settings.expected_output_tokens)
        cost = self._cost(trace, self._board.best_hit_tokens(request, trace), output_tokens)
        waiting = Waiting(number, tenant, cost, trace.hints.priority, now_s + self._settings.max_wait_s)
        offer = self._admission.offer(waiting, now_s)
        if offer.refused is not None:
            self.turned_away["full"] += 1
            busy = f"every replica of {trace.model} is full, and {self._settings.max_queued} sequences wait for room"
            error = Overloaded(busy, offer.retry_after_s)
            if offer.refused is waiting:
                raise error
            _fail(self._places.pop(offer.refused.number).turn, error)
        turn = asyncio.get_running_loop().create_future()
        self._places[number] = _Place(turn, trace, self._labels.label(tenant))
        self._labels.retired.clear()  # nothing is counted by label, so nothing has to be taken back
        self._keep_looking()
        try:
            await turn
        finally:
            if self._places.pop(number, None) is not None:  # its client went away
                self._admission.queue.cancel(number)
            elif turn.done() and not turn.cancelled():
                turn.exception()  # asyncio complains of one that nobody took, if the client goes away just then
        self._charged[trace.sequence_id] = cost  # the queue has, when it was its turn
        trace.waited_s = self._clock() - now_s
        self.waited_s.observe(trace.waited_s)

    def _cost(self, trace: RouteTrace, held_tokens: int, output_tokens: int) -> float:
        return request_cost(trace.prompt_tokens, held_tokens, output_tokens, self._settings.output_weight)

    def _look(self, prompt_tokens: int) -> None:
        """Let those go that there is room for, if requests have about so many tokens."""
        view = self._board.view()
        self._on_the_way = [trace for trace in self._on_the_way if not trace.decided_s and not trace.ended_s]
        for waiting in self._admission.look(view, len(self._on_the_way), prompt_tokens, self._clock()):
            place = self._places.pop(waiting.number)
            if not place.turn.done():  # else its client went away just now
                place.turn.set_result(None)
                self._on_the_way.append(place.trace)

    def _look_on(self) -> None:
        """The same for those who wait; and who has waited too long has to go."""
        queue = self._admission.queue
        for late in queue.expire(self._clock()):
            self.turned_away["too_long"] += 1
            place = self._places.pop(late.number)
            busy = f"no replica of {place.trace.model} had room for {self._settings.max_wait_s:g} s"
            _fail(place.turn, Overloaded(busy, queue.retry_after_s(late.tenant)))
        if self._places:
            self._look(next(iter(self._places.values())).trace.prompt_tokens)

    def _keep_looking(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._look_on()
        if self._places:
            self._keep_looking()


def _tenant(trace: RouteTrace) -> str:
    return trace.hints.tenant or DEFAULT_TENANT


def _fail(turn: asyncio.Future[None], error: Overloaded) -> None:
    if not turn.done():
        turn.set_exception(error)
