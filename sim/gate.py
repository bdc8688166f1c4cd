"""SimGate: where requests wait in one gateway while no replica has room; `serve.router.fair_gate` in virtual time."""

from typing import NamedTuple

from serve.core.fair_queue import Waiting, request_cost
from serve.core.routing.admission import Admission
from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.router import Router
from sim.workload import SimRequest

_DEFAULT_TENANT = "default"


class Turn(NamedTuple):
    """Who may go now, in this order, and who has to give up. Numbers of requests."""

    go: list[int]
    refused: list[int]


class _Waiter(NamedTuple):
    request: SimRequest
    charged: float


class SimGate:
    """Lets requests through at once while there is room, and in turn when there is not.

    Args:
        settings: Section `fairness` of the model's routing.
        router: Of the gateway.
    """

    def __init__(self, settings: FairnessSettings, router: Router) -> None:
        self._settings = settings
        self._router = router
        self._admission = Admission(settings)
        self._waiting: dict[int, _Waiter] = {}
        self._charged: dict[int, float] = {}  # cost of those that have waited, and went

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def enter(self, number: int, request: SimRequest, max_tokens: int, now_s: float) -> Turn:
        """Let a request go or wait."""
        if not self._settings.enabled or self._admission.unrivalled(request.tenant, request.priority, now_s):
            return Turn([number], [])
        if self._admission.passes(now_s):
            return Turn([number], [])
        go = self._look(request.prompt_tokens, now_s)
        if self._admission.passes(now_s):
            return Turn([*go, number], [])
        output_tokens = min(max_tokens, self._settings.expected_output_tokens)
        cost = self._cost(request, self._held_tokens(request), output_tokens)
        deadline_s = now_s + self._settings.max_wait_s
        waiting = Waiting(number, request.tenant or _DEFAULT_TENANT, cost, request.priority, deadline_s)
        refused = self._admission.offer(waiting, now_s).refused
        self._waiting[number] = _Waiter(request, cost)
        if refused is None:
            return Turn(go, [])
        del self._waiting[refused.number]
        return Turn(go, [refused.number])

    def look_on(self, now_s: float) -> Turn:
        """Let those go that there is room for; who has waited too long gives up."""
        late = [waiting.number for waiting in self._admission.queue.expire(now_s)]
        for number in late:
            del self._waiting[number]
        if not self._waiting:
            return Turn([], late)
        return Turn(self._look(next(iter(self._waiting.values())).request.prompt_tokens, now_s), late)

    def end(self, number: int, request: SimRequest, cached_tokens: int) -> None:
        """A request that was let go has ended: its tenant is charged for what it took."""
        charged = self._charged.pop(number, None)
        if charged is not None:
            cost = self._cost(request, cached_tokens, request.output_tokens)
            self._admission.queue.correct(request.tenant or _DEFAULT_TENANT, cost - charged)

    def _look(self, prompt_tokens: int, now_s: float) -> list[int]:
        # Who may go is routed, and so counted in the view, before anybody looks again: nobody is on the way.
        view = self._router.fleet.view(now_s)
        go = [waiting.number for waiting in self._admission.look(view, 0, prompt_tokens, now_s)]
        for number in go:
            self._charged[number] = self._waiting.pop(number).charged
        return go

    def _held_tokens(self, request: SimRequest) -> int:
        found = self._router.index.match(request.hashes).hit
        return int(found.max(initial=0)) * self._router.tokens_per_block

    def _cost(self, request: SimRequest, held_tokens: int, output_tokens: int) -> float:
        return request_cost(request.prompt_tokens, held_tokens, output_tokens, self._settings.output_weight)
