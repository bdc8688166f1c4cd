"""Backend port: the models behind the gateway, however they are reached."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from serve.core.request import GenerateRequest, TokenDelta
from serve.ingress.routing_desk import RoutingDesk
from serve.router.hints import NO_HINTS, RouteHints

FAILED = "failed to start; see the log"  # in ModelReadiness.message: Serve has given up


@dataclass(frozen=True)
class ModelReadiness:
    """How ready one model is.

    Attributes:
        model: Its id.
        ready_replicas: Replicas that take requests now.
        target_replicas: Replicas that are wanted now.
        message: What the others are doing, for people.
        asleep: Scaled to zero on purpose; a request wakes it.
    """

    model: str
    ready_replicas: int
    target_replicas: int
    message: str = ""
    asleep: bool = False


class Backend(Protocol):
    """Carries a sequence to a replica of its model, and its tokens back."""

    @property
    def desk(self) -> RoutingDesk:
        """What knows how sequences are routed, and were."""

    def generate(self, request: GenerateRequest, hints: RouteHints = NO_HINTS) -> AsyncGenerator[TokenDelta, None]:
        """Stream a sequence as `Engine.generate` does; deltas that were queued together arrive merged.

        Closing the generator cancels the sequence. Its record at the desk is complete before its last delta arrives.

        Raises:
            RequestError, Overloaded, EngineDead: As the engine; EngineDead also if the connection to it is lost.
        """

    def fallbacks(self) -> Mapping[str, str]:
        """Return the models that are not served as configured, as last heard, and by what. Never blocks."""

    async def readiness(self) -> list[ModelReadiness]:
        """Return the state of every model. Takes no longer than a second; raises nothing."""
