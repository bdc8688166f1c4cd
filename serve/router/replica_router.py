"""ReplicaRouter: Ray Serve's request router of a model's deployment. Asks the RoutingBoard, and obeys.

Serve pickles this module by value into every process that holds a handle. It must import nothing but by name, and hold
no state of its own.
"""

import logging
from asyncio import Future
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.core.request import GenerateRequest
from serve.core.routing.settings import parse_policy
from serve.router import registry
from serve.router.board import RoutingBoard
from serve.router.subscriber import make_feeds

logger = logging.getLogger(__name__)


def router_config(deployment: str, model: str, routing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `request_router_config` of a model's deployment.

    Args:
        deployment: Its name.
        model: Id of the model.
        routing: Section `routing` of its configuration, as JSON has it.
    """
    return {
        "request_router_class": f"{__name__}:ReplicaRouter",
        "request_router_kwargs": {"deployment": deployment, "model": model, "routing": dict(routing)},
    }


class ReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """No FIFOMixin: a request gets the replica that was chosen for it, and no other request's."""

    _board: RoutingBoard
    _by_name: dict[str, RunningReplica]

    def initialize_state(self, deployment: str, model: str, routing: Mapping[str, Any]) -> None:
        """Called by Serve with `request_router_kwargs`."""

        def make() -> RoutingBoard:
            return RoutingBoard(model, parse_policy(routing), make_feeds)

        self._by_name = {}
        self._board = registry.find_or_make(self.app_name, deployment, make)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with all replicas, when anything about them has changed."""
        self._by_name = {_name(replica.replica_id): replica for replica in replicas}
        with _guarded():
            self._board.roster.update({name: replica.replica_metadata for name, replica in self._by_name.items()})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call finds a replica dead, before its controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self._by_name.pop(_name(replica_id), None)
        with _guarded():
            self._board.roster.died(_name(replica_id))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request. Called again when it was refused, and again and again while all are full."""
        if pending_request is None:
            return [candidate_replicas]
        # Without it, Serve asks again at once if nobody has room, for ever, and no other task of this loop runs.
        pending_request.routing_context.should_backoff = True
        request = pending_request.args[0] if pending_request.args else None
        if not isinstance(request, GenerateRequest):
            return [candidate_replicas]
        with _guarded():
            choice = self._board.choose(request, _refused_by(pending_request), self._has_room)
            if choice is not None:
                pending_request.args[0] = choice.request
                return self._ranks(choice.best)
        return [candidate_replicas]

    def _ranks(self, best: list[str]) -> list[list[RunningReplica]]:
        """Return the best, one in a rank, which is tried before the next; and then all, if they are not all."""
        ranks = [[self._by_name[name]] for name in best]
        return ranks if len(best) == len(self._by_name) else [*ranks, list(self._by_name.values())]

    def _has_room(self, name: str) -> bool:
        """Whether a replica has room, as far as is known. Serve would ask a full one how full it is, and wait."""
        replica = self._by_name.get(name)
        if replica is None:
            return False
        in_hand = self.replica_queue_len_cache.get(replica.replica_id)
        return in_hand is None or in_hand < replica.max_ongoing_requests

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Called by Serve when a replica has accepted a request."""
        request = pending_request.args[0] if pending_request.args else None
        if isinstance(request, GenerateRequest):
            with _guarded():
                self._board.accepted(request.request_id, _name(replica_id))


@contextmanager
def _guarded() -> Iterator[None]:
    """Log a defect of ours and go on: Serve would never answer the request, or never hear of its replicas again."""
    try:
        yield
    except Exception:
        logger.exception("A routing decision failed; Ray Serve goes on without.")


def _refused_by(pending_request: PendingRequest) -> str:
    """Return who was asked since the request was last ranked, and did not take it; empty: nobody.

    Serve does not say it. But the future of a request gets the replica that is asked, and another future takes its
    place when that replica refuses or cannot be reached.
    """
    before: Future[RunningReplica] | None = getattr(pending_request, "raytrt_future", None)
    pending_request.raytrt_future = now = pending_request.future
    if before is None or before is now or not before.done() or before.cancelled():
        return ""
    return _name(before.result().replica_id)


def _name(replica_id: ReplicaID) -> str:
    name: str = replica_id.to_full_id_str()
    return name
