"""A gateway without HTTP: production router and subscriber, and requests that are sent again when a replica dies."""

import time
from collections.abc import Awaitable, Callable, Sequence

from serve.core.blocks import block_hashes, chain_seed
from serve.core.kv_events import KvEvent
from serve.core.request import GenerateRequest
from serve.core.routing.load import LoadReport
from serve.core.routing.policies.predictive import PredictivePolicy
from serve.core.routing.request import RouteRequest, route_id
from serve.core.routing.router import Router
from serve.errors import EngineDead
from serve.router.subscriber import EventSubscriber
from serve.router.wire import PlaneAddress
from tests.unit.router.mirror_sink import MirrorSink

Send = Callable[[str, GenerateRequest], Awaitable[int]]


class Gateway(MirrorSink):
    """One gateway.

    Args:
        size: Tokens per block.
        send: Runs a sequence on a replica, given by its name; raises EngineDead if that is lost.
    """

    def __init__(self, size: int, send: Send) -> None:
        super().__init__()
        self.router = Router(PredictivePolicy(), size)
        self.subscriber = EventSubscriber(self)
        self._size = size
        self._send = send
        self._seen: set[int] = set()

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        self.router.apply(replica_id, events)
        super().apply(replica_id, events)
        self._seen.update(block for event in events for block in event.block_hashes)

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        self.router.report(replica_id, report, time.monotonic(), new_epoch=new_epoch)
        super().report(replica_id, report, new_epoch=new_epoch)

    def add(self, replica_id: str, address: PlaneAddress) -> None:
        """A replica is there."""
        self.router.add(replica_id, time.monotonic())
        self.subscriber.listen(replica_id, address)

    def remove(self, replica_id: str) -> None:
        """A replica is gone."""
        self.subscriber.forget(replica_id)
        self.router.remove(replica_id)
        self.content.pop(replica_id, None)

    async def generate(self, request: GenerateRequest, max_attempts: int = 40) -> tuple[int, int]:
        """Run a sequence wherever the router says; return how many tokens it brought, and the attempts it took.

        Raises:
            EngineDead: Every attempt failed.
        """
        hashes = block_hashes(request.prompt_array(), self._size, chain_seed()).tolist()
        retried: frozenset[str] = frozenset()
        for attempt in range(1, max_attempts + 1):
            name, tokens = route_id(request.request_id), request.prompt_tokens
            route = RouteRequest(name, hashes, tokens, request.sampling.max_tokens, retried=retried)
            decision = self.router.route(route, time.monotonic())
            assert decision is not None, "there is always a replica"
            chosen = decision.replica_id
            self.router.commit(route, decision, time.monotonic())
            try:
                return await self._send(chosen, request), attempt
            except EngineDead:
                # It may have come back under its name, and then be as good as any.
                retried = retried | {chosen} if len(retried) + 1 < len(self.router.fleet.replica_ids) else frozenset()
            finally:
                self.router.settle(name)
        raise EngineDead(f"{request.request_id} failed {max_attempts} times")

    def knows(self, truth: dict[str, frozenset[int]]) -> bool:
        """Whether exactly these blocks are known of each replica."""
        return all(self.content.get(name, {}).keys() == blocks for name, blocks in truth.items())

    def check_index(self, truth: dict[str, frozenset[int]]) -> None:
        """Check that the prefix index says the same of every block there ever was."""
        for block in self._seen.union(*truth.values()):
            hits = self.router.index.match([block]).hit
            for name, blocks in truth.items():
                assert bool(hits[self.router.index.row(name)]) == (block in blocks), (name, block)
