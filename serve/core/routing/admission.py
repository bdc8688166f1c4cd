"""Admission: whether a request of one model goes to a replica at once, or waits, and who of those that wait is next.

Gateways and the simulator run this same code. The fleet is not looked at for each request: a look counts the places
there are, and until they are taken, or the look is old, the next request costs one comparison.
"""

from serve.core.fair_queue import FairQueue, Offer, Waiting
from serve.core.routing.decision import FleetView
from serve.core.routing.fairness import FairnessSettings
from serve.core.routing.saturation import places

_LOOK_LASTS_S = 0.05
_RIVALRY_LASTS_S = 600.0


class Admission:
    """Decides for one model in one gateway. Not thread-safe; never waits.

    A request goes at once if it is `unrivalled` or `passes`, also after a `look` that finds room; else it is offered.
    While somebody waits, `look` from time to time, and when a replica may have got room.

    Args:
        settings: Section `fairness`.
    """

    def __init__(self, settings: FairnessSettings) -> None:
        self.queue = FairQueue(settings.limits)
        self._room = settings.room
        self._has_weights = bool(settings.weights)
        self._last: tuple[str, int] | None = None
        self._rivals_until_s = float("-inf")
        self._free = 0  # places, by the last look; 0 while somebody waits
        self._until_s = float("-inf")

    def unrivalled(self, tenant: str, priority: int, now_s: float) -> bool:
        """Return whether a request may go however full the fleet is, because there is nobody to share it with.

        That is so as long as all requests have the same tenant and priority, and nobody has said how to share. Where
        requests wait makes no difference then, and at a replica they are closer to their turn.
        """
        if (tenant, priority) != self._last:
            if self._last is not None:
                self._rivals_until_s = now_s + _RIVALRY_LASTS_S
            self._last = (tenant, priority)
        return now_s >= self._rivals_until_s and not self._has_weights and not self.queue

    def passes(self, now_s: float) -> bool:
        """Return whether a request may go at once, as far as is known; if so, it is counted as gone."""
        if self._free > 0 and now_s < self._until_s:
            self._free -= 1
            return True
        return False

    def look(self, view: FleetView | None, on_the_way: int, prompt_tokens: float, now_s: float) -> list[Waiting]:
        """Count the places there are; return those who waited and may go now, in their order.

        Args:
            view: All replicas. An empty fleet has room, or none at all: whoever routes will say what is wrong with it.
            on_the_way: Requests that may go since before, and that the view does not count yet.
            prompt_tokens: > 0; what each will compute, about.
            now_s: The time.
        """
        free = len(self.queue) + 1
        if view is not None and len(view):
            free = places(view, self._room, prompt_tokens) - on_the_way
        gone = []
        while free > 0 and (request := self.queue.take(now_s)) is not None:
            gone.append(request)
            free -= 1
        self._free, self._until_s = (0 if self.queue else free), now_s + _LOOK_LASTS_S
        return gone

    def offer(self, request: Waiting, now_s: float) -> Offer:
        """Let a request wait that did not pass."""
        self._free = 0
        return self.queue.offer(request, now_s)
