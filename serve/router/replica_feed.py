"""ReplicaFeed: what one gateway hears of one replica, put in order and handed on in portions."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from serve.core.kv_events import KvEvent, KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.kv_feed import FeedState, FeedStep, on_batch, on_heartbeat, on_part, on_snapshot, on_tick
from serve.core.routing.load import LoadReport
from serve.router.wire import Hello, KvNews, LoadNews, SnapshotPart

SLICE_BLOCKS = 512  # applied at once: about a millisecond of the event loop
MAX_WAITING_BLOCKS = 500_000  # decoded and not applied yet; with more, starting anew is cheaper
_MAX_PARTS = 1 << 16
Words = npt.NDArray[np.uint64]


class EventSink(Protocol):
    """Whoever wants to know what replicas hold and how busy they are. Nothing here may wait."""

    def apply(self, replica_id: str, events: Sequence[KvEvent]) -> None:
        """The content of a replica's cache has changed, in this order."""

    def report(self, replica_id: str, report: LoadReport, *, new_epoch: bool = False) -> None:
        """A replica said how busy it is. `new_epoch`: its engine was started anew."""

    def connected(self, replica_id: str) -> None:
        """A replica is heard, for the first time or again."""

    def lost(self, replica_id: str) -> None:
        """A replica has been silent for too long; what is known of it grows old."""


@dataclass
class PlaneCounts:
    """Totals over all replicas.

    Attributes:
        messages: Received and understood.
        blocks: Changes of blocks that were handed on.
        reports: Load reports that were handed on.
        lost_messages: Published, and not received.
        requests: For snapshots.
        snapshots: Received as a whole.
        overflows: How often more was waiting to be applied than is worth it.
        refused: Messages of another version, or that could not be read.
    """

    messages: int = 0
    blocks: int = 0
    reports: int = 0
    lost_messages: int = 0
    requests: int = 0
    snapshots: int = 0
    overflows: int = 0
    refused: int = 0


class ReplicaFeed:
    """One replica. Owns no socket: each `hear_...` returns the number of a request for a snapshot to send, or 0.

    Load and small changes are handed on at once, if nothing waits; the rest waits here until `work` hands it on.

    Args:
        replica_id: Its id.
        sink: Gets what it says.
        counts: Shared by all feeds.
        now_s: The time.
    """

    def __init__(self, replica_id: str, sink: EventSink, counts: PlaneCounts, now_s: float) -> None:
        self.replica_id = replica_id
        self.state = FeedState()
        self.heard_s = now_s
        self._sink = sink
        self._counts = counts
        self._backlog: deque[tuple[int, Iterator[Sequence[KvEvent]]]] = deque()
        self._waiting_blocks = 0
        self._parts: dict[int, SnapshotPart] = {}
        self._parts_of = (0, 0)
        self._number = (0, 0)  # epoch and number of the last message
        self._last_load: LoadNews | None = None

    @property
    def has_work(self) -> bool:
        """Whether something waits to be handed on."""
        return bool(self._backlog)

    def hear(self, message: KvNews | LoadNews | Hello | SnapshotPart, now_s: float) -> int:
        """Take a message in."""
        self.heard_s = now_s
        self._counts.messages += 1
        if isinstance(message, KvNews):
            return self._hear_kv(message, now_s)
        if isinstance(message, LoadNews):
            self._count_lost(message.epoch, message.number)
            return self._hear_load(message, now_s)
        if isinstance(message, SnapshotPart):
            return self._hear_part(message, now_s)
        if message.load is not None:
            return self._hear_load(message.load, now_s)
        return self._obey(on_heartbeat(self.state, message.epoch, 0, now_s))

    def tick(self, now_s: float) -> int:
        """Let time pass."""
        return self._obey(on_tick(self.state, now_s))

    def start_anew(self) -> None:
        """Distrust what is known of the cache: drop what waits, and take nothing in before a snapshot."""
        self._forget_backlog()
        # The number before the first: no batch follows on it.
        self.state = self.state._replace(sequence=-1, buffer=(), confirmed=False, open_request=0)

    def work(self) -> bool:
        """Hand on the next portion; return whether there was one."""
        while self._backlog:
            blocks, portions = self._backlog[0]
            events = next(portions, None)
            if events is not None:
                self._hand_on(events, count_blocks(events))
                return True
            self._backlog.popleft()
            self._waiting_blocks -= blocks
        return False

    def _hear_kv(self, news: KvNews, now_s: float) -> int:
        self._count_lost(news.epoch, news.number)
        ask = 0
        for batch in news.batches:
            ask = self._obey(on_batch(self.state, news.epoch, batch, now_s)) or ask
        if self._waiting_blocks > MAX_WAITING_BLOCKS:
            self._counts.overflows += 1
            self.start_anew()
        return ask

    def _hear_load(self, news: LoadNews, now_s: float) -> int:
        ask = self._obey(on_heartbeat(self.state, news.epoch, news.sequence, now_s))
        if self.state.epoch != news.epoch:
            return ask  # of an engine that is over
        last, report = self._last_load, news.report
        new_epoch = last is not None and last.epoch != news.epoch
        if last is None or new_epoch or news.number > last.number:
            self._last_load = news
        elif report.accepted and news.number != last.number:  # late, but of these nobody else will tell
            report = msgspec.structs.replace(last.report, accepted=report.accepted)
        else:
            return ask
        self._counts.reports += 1
        self._sink.report(self.replica_id, report, new_epoch=new_epoch)
        return ask

    def _hear_part(self, part: SnapshotPart, now_s: float) -> int:
        if not 0 <= part.part < part.parts <= _MAX_PARTS or not _is_even(part):
            raise ValueError(f"part {part.part} of {part.parts} of a snapshot makes no sense")
        if self._parts_of != (part.epoch, part.request):
            self._parts_of, self._parts = (part.epoch, part.request), {}
        self._parts[part.part] = part
        if len(self._parts) < part.parts:
            self.state = on_part(self.state, part.request, now_s)
            return 0
        parts = [self._parts[number] for number in range(part.parts)]
        self._parts_of, self._parts = (0, 0), {}
        self._counts.snapshots += 1
        # The content may be large, so it stays packed until it is its turn; this stands for it.
        whole = KvSnapshot((), ())
        batch = KvEventBatch(part.sequence, (whole,))
        return self._obey(on_snapshot(self.state, part.epoch, part.request, batch, now_s), whole, parts)

    def _obey(self, step: FeedStep, whole: KvSnapshot | None = None, parts: Sequence[SnapshotPart] = ()) -> int:
        self.state = step.state
        events = step.events
        if whole is not None and any(event is whole for event in events):
            after = next(number for number, event in enumerate(events) if event is whole) + 1
            self._forget_backlog()
            self._backlog.append((0, unpack(parts)))
            events = events[after:]
        if events:
            self._enqueue(events)
        return step.ask

    def _enqueue(self, events: Sequence[KvEvent]) -> None:
        if any(isinstance(event, KvSnapshot) for event in events):
            first = max(number for number, event in enumerate(events) if isinstance(event, KvSnapshot))
            events = events[first:]
            self._forget_backlog()
        blocks = count_blocks(events)
        if not self._backlog and blocks <= SLICE_BLOCKS:
            self._hand_on(events, blocks)
            return
        self._waiting_blocks += blocks
        self._backlog.append((blocks, portions(events)))

    def _hand_on(self, events: Sequence[KvEvent], blocks: int) -> None:
        self._sink.apply(self.replica_id, events)
        self._counts.blocks += blocks

    def _forget_backlog(self) -> None:
        self._backlog.clear()
        self._waiting_blocks = 0

    def _count_lost(self, epoch: int, number: int) -> None:
        known_epoch, known = self._number
        if epoch != known_epoch:
            self._number = (epoch, number)
        elif number > known:
            self._counts.lost_messages += number - known - 1
            self._number = (epoch, number)


def count_blocks(events: Sequence[KvEvent]) -> int:
    """Return how many blocks events speak of, each time counted."""
    return sum(len(event.block_hashes) for event in events)


def portions(events: Sequence[KvEvent]) -> Iterator[Sequence[KvEvent]]:
    """Yield events, in order, of no more than a slice of blocks at once; long ones in pieces."""
    portion: list[KvEvent] = []
    blocks = 0
    for event in events:
        for piece in _pieces(event):
            if portion and blocks + len(piece.block_hashes) > SLICE_BLOCKS:
                yield portion
                portion, blocks = [], 0
            portion.append(piece)
            blocks += len(piece.block_hashes)
    if portion:
        yield portion


def unpack(parts: Sequence[SnapshotPart]) -> Iterator[Sequence[KvEvent]]:
    """Yield the events that make up a snapshot, in slices: the first forgets what was known, the others add to it."""
    yield [KvSnapshot((), ())]
    for part in parts:
        hashes, parents = np.frombuffer(part.hashes, "<u8"), np.frombuffer(part.parents, "<u8")
        tiers = np.frombuffer(part.tiers, np.uint8) if part.tiers else np.zeros(len(hashes), np.uint8)
        for start in range(0, len(hashes), SLICE_BLOCKS):
            here = slice(start, start + SLICE_BLOCKS)
            yield chains(hashes[here], parents[here], tiers[here])


def chains(hashes: Words, parents: Words, tiers: npt.NDArray[np.uint8]) -> list[KvEvent]:
    """Return what stores blocks that were told one by one."""
    cut = (parents[1:] != hashes[:-1]) | (tiers[1:] != tiers[:-1])
    bounds = [0, *(np.flatnonzero(cut) + 1).tolist(), len(hashes)]
    known, before, tier = hashes.tolist(), parents.tolist(), tiers.tolist()
    return [KvStored(tuple(known[i:j]), before[i], tier[i]) for i, j in pairwise(bounds)]


def _pieces(event: KvEvent) -> Iterator[KvEvent]:
    blocks = event.block_hashes
    if len(blocks) <= SLICE_BLOCKS:
        yield event
        return
    if isinstance(event, KvSnapshot):
        yield KvSnapshot((), ())
        words = np.array(blocks, dtype=np.uint64), np.array(event.parents, dtype=np.uint64)
        tiers = np.array(event.tiers, dtype=np.uint8) if event.tiers else np.zeros(len(blocks), np.uint8)
        for start in range(0, len(blocks), SLICE_BLOCKS):
            here = slice(start, start + SLICE_BLOCKS)
            yield from chains(words[0][here], words[1][here], tiers[here])
        return
    for start in range(0, len(blocks), SLICE_BLOCKS):
        piece = blocks[start : start + SLICE_BLOCKS]
        if isinstance(event, KvStored):
            yield KvStored(piece, blocks[start - 1] if start else event.parent, event.tier)
        else:
            yield KvRemoved(piece)


def _is_even(part: SnapshotPart) -> bool:
    """Whether a part says as much of one thing as of another."""
    blocks, rest = divmod(len(part.hashes), 8)
    return rest == 0 and len(part.parents) == len(part.hashes) and len(part.tiers) in (0, blocks)
