"""ReplicaFeed: what was heard is handed on in order and in portions, whatever is missing or late."""

from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.core.kv_content import KvContent
from serve.core.kv_events import GPU, HOST, KvEvent, KvEventBatch, KvRemoved, KvSnapshot, KvStored
from serve.core.kv_feed import MAX_BUFFERED
from serve.core.routing.load import LoadReport
from serve.router.replica_feed import MAX_WAITING_BLOCKS, SLICE_BLOCKS, PlaneCounts, ReplicaFeed, portions, unpack
from serve.router.wire import Facts, Hello, KvNews, LoadNews, SnapshotPart
from tests.unit.router.mirror_sink import MirrorSink

FACTS = Facts("engine", 32, 100, 1000)
R = "replica"


def stored(*blocks: int, parent: int = 0, tier: int = GPU) -> KvStored:
    return KvStored(blocks, parent, tier)


def news(number: int, *batches: tuple[int, Sequence[KvEvent]], epoch: int = 7) -> KvNews:
    return KvNews(1, epoch, number, tuple(KvEventBatch(sequence, tuple(events)) for sequence, events in batches))


def load(number: int, sequence: int, report: LoadReport, epoch: int = 7) -> LoadNews:
    return LoadNews(1, epoch, number, sequence, report, 0.0)


def parts_of(
    content: KvContent, sequence: int, request: int, *, epoch: int = 7, blocks: int = 1500
) -> list[SnapshotPart]:
    packed = content.pack()
    total = max(1, -(-len(packed) // blocks))
    return [
        SnapshotPart(
            1,
            epoch,
            request,
            sequence,
            part,
            total,
            packed.hashes[8 * blocks * part : 8 * blocks * (part + 1)],
            packed.parents[8 * blocks * part : 8 * blocks * (part + 1)],
            packed.tiers[blocks * part : blocks * (part + 1)],
        )
        for part in range(total)
    ]


class Heard:
    """A feed that has answers to its requests, and is in step with its replica at batch `sequence`."""

    def __init__(self, content: KvContent | None = None, sequence: int = 0) -> None:
        self.sink, self.counts, self.now_s = MirrorSink(), PlaneCounts(), 0.0
        self.feed = ReplicaFeed(R, self.sink, self.counts, 0.0)
        for part in parts_of(content or KvContent(), sequence, self.feed.tick(0.0)):
            assert not self.feed.hear(part, 0.0)
        self.work()

    def work(self) -> None:
        while self.feed.work():
            pass

    @property
    def content(self) -> dict[int, int]:
        return self.sink.content.get(R, {})

    @property
    def reports(self) -> list[tuple[LoadReport, bool]]:
        return self.sink.reports.get(R, [])


@st.composite
def histories(draw: st.DrawFn) -> list[KvEvent]:
    """Draw events, some of which are much larger than a slice."""
    events: list[KvEvent] = []
    fresh = count(1)
    for kind in draw(st.lists(st.sampled_from("srax"), max_size=6)):
        size = draw(st.sampled_from([0, 1, 5, SLICE_BLOCKS, SLICE_BLOCKS + 1, 3 * SLICE_BLOCKS - 1]))
        blocks = tuple(next(fresh) for _ in range(size))
        if kind == "s":
            events.append(KvStored(blocks, 0, draw(st.sampled_from([GPU, HOST]))))
        elif kind == "r":
            events.append(KvRemoved(tuple(block - draw(st.integers(0, 3)) for block in blocks[:2000])))
        else:
            parents = tuple(draw(st.sampled_from([block - 1, 3])) for block in blocks[:50]) + blocks[50:]
            events.append(KvSnapshot(blocks, parents, tuple(block % 2 for block in blocks) if kind == "a" else ()))
    return events


@settings(max_examples=30)
@given(events=histories())
def test_portions_say_the_same_in_slices(events: list[KvEvent]) -> None:
    whole, pieces = MirrorSink(), MirrorSink()
    for event in events:
        whole.apply(R, [event])
    for portion in portions(events):
        pieces.apply(R, portion)
    assert pieces.content.get(R, {}) == whole.content.get(R, {})
    assert pieces.parents.get(R, {}) == whole.parents.get(R, {})
    assert pieces.largest <= SLICE_BLOCKS


@settings(max_examples=30)
@given(events=histories(), size=st.integers(1, 4000))
def test_a_snapshot_in_parts_is_the_content(events: list[KvEvent], size: int) -> None:
    content, expected, found = KvContent(), MirrorSink(), MirrorSink()
    expected.apply(R, [KvSnapshot((), ())])
    for event in events:
        content.apply(event)
        expected.apply(R, [event])
    found.apply(R, [stored(99)])
    for portion in unpack(parts_of(content, 5, 1, blocks=size)):
        found.apply(R, portion)
    assert (found.content, found.parents) == (expected.content, expected.parents)
    assert found.largest <= SLICE_BLOCKS


def test_what_follows_a_large_snapshot_waits_behind_it() -> None:
    content = KvContent()
    content.apply(KvStored(tuple(range(10, 10 + 5 * SLICE_BLOCKS)), 0))
    heard = Heard()
    request = heard.feed.hear(news(1, (9, [stored(5)])), 1.0)  # after a gap
    for part in parts_of(content, 12, request):
        heard.feed.hear(part, 1.1)
    heard.feed.hear(news(5, (13, [KvRemoved((10, 11))]), (14, [stored(10)])), 1.2)
    assert heard.feed.has_work
    assert heard.content == {}
    heard.work()
    assert heard.content.keys() == {*range(10, 10 + 5 * SLICE_BLOCKS)} - {11}
    assert heard.sink.largest <= SLICE_BLOCKS


def test_a_snapshot_makes_what_waits_before_it_void() -> None:
    heard = Heard()
    heard.feed.hear(news(1, (1, [KvStored(tuple(range(100, 100 + 5 * SLICE_BLOCKS)), 0)])), 1.0)
    assert heard.feed.work()
    calls = heard.sink.calls
    heard.feed.hear(news(2, (2, [KvSnapshot((), ()), stored(7)])), 1.0)
    heard.work()
    assert heard.content == {7: GPU}
    assert heard.sink.calls - calls <= 2


def test_parts_in_any_order_make_one_snapshot() -> None:
    content = KvContent()
    content.apply(KvStored(tuple(range(4000)), 0))
    heard = Heard()
    request = heard.feed.hear(load(1, 3, LoadReport()), 1.0)
    for part in reversed(parts_of(content, 3, request, blocks=1000)):
        heard.feed.hear(part, 1.1)
    heard.work()
    assert len(heard.content) == 4000
    assert not heard.feed.state.is_behind
    assert heard.counts.snapshots == 2


def test_parts_of_different_answers_are_not_mixed() -> None:
    old, new = KvContent(), KvContent()
    old.apply(KvStored(tuple(range(3000)), 0))
    new.apply(KvStored(tuple(range(3000, 6000)), 0))
    heard = Heard()
    first = heard.feed.hear(load(1, 3, LoadReport()), 1.0)
    heard.feed.hear(parts_of(old, 3, first)[0], 1.1)
    second = heard.feed.tick(5.0)
    assert second > first
    for part in (*parts_of(new, 4, second), parts_of(old, 3, first)[1]):
        heard.feed.hear(part, 5.1)
    heard.work()
    assert heard.content.keys() == {*range(3000, 6000)}


@pytest.mark.parametrize(
    "part",
    [
        SnapshotPart(1, 7, 1, 3, 2, 2, b"", b""),
        SnapshotPart(1, 7, 1, 3, -1, 2, b"", b""),
        SnapshotPart(1, 7, 1, 3, 0, 1 << 40, b"", b""),
        SnapshotPart(1, 7, 1, 3, 0, 1, b"1234567", b"1234567"),
        SnapshotPart(1, 7, 1, 3, 0, 1, b"12345678", b""),
        SnapshotPart(1, 7, 1, 3, 0, 1, b"12345678", b"12345678", b"12"),
    ],
)
def test_a_part_that_makes_no_sense_is_refused(part: SnapshotPart) -> None:
    heard = Heard()
    with pytest.raises(ValueError, match="makes no sense"):
        heard.feed.hear(part, 1.0)
    assert heard.content == {}


def test_load_is_told_in_order_and_once() -> None:
    heard = Heard()
    for number in (3, 5, 5, 4, 6):
        heard.feed.hear(load(number, 0, LoadReport(running=number, accepted=(number,))), 1.0)
    running = [(report.running, report.accepted) for report, _ in heard.reports]
    # Number 4 was late: what it says of the load is over, but whom it accepted nobody else tells.
    assert running == [(3, (3,)), (5, (5,)), (5, (4,)), (6, (6,))]
    assert not any(new_epoch for _, new_epoch in heard.reports)


def test_load_of_a_new_engine_says_that_it_is_new_and_of_the_old_one_nothing() -> None:
    heard = Heard()
    heard.feed.hear(load(8, 0, LoadReport(running=1)), 1.0)
    heard.feed.hear(load(1, 0, LoadReport(running=2), epoch=8), 1.0)
    heard.feed.hear(load(9, 0, LoadReport(running=3)), 1.0)
    heard.feed.hear(load(2, 0, LoadReport(running=4), epoch=8), 1.0)
    assert [(report.running, new_epoch) for report, new_epoch in heard.reports] == [(1, False), (2, True), (4, False)]


def test_a_heartbeat_tells_of_a_batch_that_never_came() -> None:
    heard = Heard()
    assert heard.feed.hear(load(1, 0, LoadReport()), 1.0) == 0
    assert heard.feed.hear(load(2, 1, LoadReport()), 1.5) > 0


def test_hello_brings_the_load_at_once() -> None:
    heard = Heard()
    heard.feed.hear(Hello(1, 7, FACTS, load(4, 0, LoadReport(running=9))), 1.0)
    heard.feed.hear(Hello(1, 7, FACTS, None), 1.0)
    assert [report.running for report, _ in heard.reports] == [9]


def test_lost_messages_are_counted() -> None:
    heard = Heard()
    for number in (1, 2, 5):
        heard.feed.hear(load(number, 0, LoadReport()), 1.0)
    heard.feed.hear(news(9, (1, [stored(1)])), 1.0)
    heard.feed.hear(load(100, 0, LoadReport(), epoch=8), 1.0)
    assert heard.counts.lost_messages == 2 + 3


def test_a_backlog_that_is_too_long_is_given_up_for_a_snapshot() -> None:
    heard = Heard()
    size = 10_000
    for number in range(1, MAX_WAITING_BLOCKS // size + 2):
        first = number * size
        assert not heard.feed.hear(news(number, (number, [KvStored(tuple(range(first, first + size)), 0)])), 1.0)
    assert heard.counts.overflows == 1
    assert not heard.feed.has_work
    assert heard.feed.hear(news(99, (number + 1, [stored(1)])), 2.0)
    assert heard.content == {}


def test_batches_before_the_first_snapshot_wait_in_a_bounded_buffer() -> None:
    sink, counts = MirrorSink(), PlaneCounts()
    feed = ReplicaFeed(R, sink, counts, 0.0)
    for number in range(2, 2 + 2 * MAX_BUFFERED):
        feed.hear(news(number, (number, [stored(number)])), 1.0)
    assert not sink.content
    assert len(feed.state.buffer) <= MAX_BUFFERED


def test_after_distrust_only_a_snapshot_counts() -> None:
    heard = Heard()
    heard.feed.hear(news(1, (1, [stored(1)])), 1.0)
    heard.feed.start_anew()
    for number in (1, 2, 3):
        heard.feed.hear(news(number, (number, [stored(10 + number)])), 1.5)
    assert heard.content == {1: GPU}
    content = KvContent()
    content.apply(stored(2))
    request = heard.feed.tick(10.0)
    heard.feed.hear(parts_of(content, 2, request)[0], 10.0)
    heard.work()
    assert heard.content == {2: GPU, 13: GPU}
