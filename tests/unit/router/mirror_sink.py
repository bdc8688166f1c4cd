"""A sink that remembers everything, and lets tests wait for it."""

import asyncio
from collections.abc import Callable, Sequence

from serve.core.kv_events import GPU, KvEvent, KvSnapshot, KvStored
from serve.core.routing.load import LoadReport


class MirrorSink:
    """What one gateway was told.

    Attributes:
        content: By replica, the tier of each block.
        parents: By replica, the parent of each block.
        largest: Most blocks that came at once.
        reports: By replica, all of them; and whether each was of a new epoch.
        heard: Replicas that are.
    """

    def __init__(self) -> None:
        self.content: dict[str, dict[int, int]] = {}
        self.parents: dict[str, dict[int, int]] = {}
        self.largest = 0
        self.calls = 0
        self.reports: dict[str, list[tuple[LoadReport, bool]]] = {}
        self.heard: set[str] = set()
        self._changed: asyncio.Event | None = None

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        content, parents = self.content.setdefault(replica_id, {}), self.parents.setdefault(replica_id, {})
        self.calls += 1
        self.largest = max(self.largest, sum(len(event.block_hashes) for event in events))
        for event in events:
            if isinstance(event, KvSnapshot):
                content.clear()
                parents.clear()
                content.update(zip(event.block_hashes, event.tiers or (GPU,) * len(event.block_hashes), strict=True))
                parents.update(zip(event.block_hashes, event.parents, strict=True))
            elif isinstance(event, KvStored):
                content.update(dict.fromkeys(event.block_hashes, event.tier))
                parents.update(zip(event.block_hashes, (event.parent, *event.block_hashes), strict=False))
            else:
                for block in event.block_hashes:
                    content.pop(block, None)
                    parents.pop(block, None)
        self._notify()

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        self.reports.setdefault(replica_id, []).append((report, new_epoch))
        self._notify()

    def connected(self, replica_id: str) -> None:
        self.heard.add(replica_id)
        self._notify()

    def lost(self, replica_id: str) -> None:
        self.heard.discard(replica_id)
        self._notify()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until something that this sink is told makes the condition true; it may ask for what is not told yet."""
        self._changed = asyncio.Event()
        async with asyncio.timeout(timeout_s):
            while not _holds(condition):
                await self._changed.wait()
                self._changed.clear()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except LookupError:  # of a replica that told nothing so far
        return False
