"""KvLedger: every reader can reconstruct the content and its tiers, whenever it begins and however slow it is."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_events import (
    DISK,
    GPU,
    HOST,
    KvDraft,
    KvEvent,
    KvEventBatch,
    KvLedger,
    KvRemoved,
    KvSnapshot,
    KvStored,
)

hashes = st.integers(0, 30)
tiers = st.sampled_from([GPU, GPU, HOST, DISK])
changes = st.one_of(
    st.builds(KvStored, st.lists(hashes, min_size=1, max_size=4).map(tuple), hashes, tiers),
    st.builds(KvRemoved, st.lists(hashes, min_size=1, max_size=4).map(tuple)),
)
Change = KvStored | KvRemoved
events = st.lists(changes, max_size=4)
steps = st.lists(st.tuples(st.booleans(), events), max_size=12)  # (all before is forgotten, changes)
Step = tuple[bool, list[Change]]
Content = dict[int, tuple[int, int]]


@dataclass
class Mirror:
    """A consumer's copy of the content: of each block, its parent and its tier."""

    blocks: Content = field(default_factory=dict)
    sequence: int = -1
    snapshots: int = 0

    def apply(self, batch: KvEventBatch) -> None:
        first = batch.events[0]
        if isinstance(first, KvSnapshot):
            self.snapshots += 1
        else:
            assert batch.sequence == self.sequence + 1
        self.sequence = batch.sequence
        for event in batch.events:
            apply(self.blocks, event)

    @property
    def parents(self) -> dict[int, int]:
        return {block_hash: parent for block_hash, (parent, _) in self.blocks.items()}


def apply(blocks: Content, event: KvEvent) -> None:
    """What an event means, said in the simplest way."""
    if isinstance(event, KvSnapshot):
        blocks.clear()
        for i, block_hash in enumerate(event.block_hashes):
            blocks[block_hash] = (event.parents[i], event.tiers[i] if event.tiers else GPU)
    elif isinstance(event, KvRemoved):
        for block_hash in event.block_hashes:
            blocks.pop(block_hash, None)
    else:
        for i, block_hash in enumerate(event.block_hashes):
            blocks[block_hash] = (event.block_hashes[i - 1] if i else event.parent, event.tier)


def content_after(recorded: Iterable[Step]) -> Content:
    blocks: Content = {}
    for is_afresh, step in recorded:
        if is_afresh:
            blocks.clear()
        for event in step:
            apply(blocks, event)
    return blocks


def record(ledger: KvLedger, step: Step) -> None:
    is_afresh, events = step
    if is_afresh:
        ledger.record_afresh(events)
    else:
        ledger.record(events)


@asynccontextmanager
async def reading(ledger: KvLedger) -> AsyncIterator[Mirror]:
    """Follow a ledger from now on."""
    mirror, seeded = Mirror(), asyncio.Event()

    async def follow() -> None:
        async with aclosing(ledger.read()) as batches:
            async for batch in batches:
                mirror.apply(batch)
                seeded.set()

    task = asyncio.create_task(follow())
    await asyncio.wait_for(seeded.wait(), 5)
    yield mirror
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def caught_up(mirror: Mirror, sequence: int) -> None:
    async with asyncio.timeout(5):
        while mirror.sequence < sequence:  # noqa: ASYNC110  # the mirror announces nothing
            await asyncio.sleep(0)


@given(recorded=steps, begin=st.integers(0, 12), max_lag=st.integers(1, 4), breaks=st.sets(st.integers(0, 12)))
def test_readers_see_the_content(recorded: list[Step], begin: int, max_lag: int, breaks: set[int]) -> None:
    async def scenario() -> None:
        ledger = KvLedger(max_lag)
        for step in recorded[:begin]:
            record(ledger, step)
        async with reading(ledger) as mirror:
            assert mirror.blocks == content_after(recorded[:begin])
            for i, step in enumerate(recorded[begin:]):
                record(ledger, step)
                if i in breaks:  # let the reader catch up, or let it fall behind
                    await asyncio.sleep(0)
            await caught_up(mirror, sum(1 for is_afresh, step in recorded if is_afresh or step))
            assert mirror.blocks == content_after(recorded)
            assert ledger.content() == frozenset(mirror.blocks)
            for tier in (GPU, HOST, DISK):
                assert ledger.count(tier) == [found for _, found in mirror.blocks.values()].count(tier)

    asyncio.run(scenario())


async def test_a_reader_that_falls_behind_gets_one_snapshot_instead() -> None:
    ledger = KvLedger(max_lag=3)
    async with reading(ledger) as mirror:
        for number in range(10):
            ledger.record([KvStored((number,), 99)])
        await caught_up(mirror, 10)
        assert mirror.snapshots == 2
        ledger.record([KvRemoved((3,))])
        await caught_up(mirror, 11)
        assert mirror.snapshots == 2
        assert mirror.parents.keys() == set(range(10)) - {3}


async def test_nothing_recorded_is_no_batch() -> None:
    ledger = KvLedger()
    async with reading(ledger) as mirror:
        ledger.record([])
        ledger.record([KvStored((1,), 0)])
        await caught_up(mirror, 1)
        assert mirror.sequence == 1


async def test_readers_do_not_disturb_each_other() -> None:
    ledger = KvLedger()
    ledger.record([KvStored((1, 2), 0)])
    async with reading(ledger) as first:
        async with reading(ledger) as second:
            ledger.record([KvStored((3,), 2)])
            await caught_up(first, 2)
            await caught_up(second, 2)
        ledger.record([KvRemoved((2, 3))])
        await caught_up(first, 3)
        assert first.parents == {1: 0}
        assert second.parents == {1: 0, 2: 1, 3: 2}


async def test_events_recorded_by_another_thread_arrive() -> None:
    ledger = KvLedger(max_lag=10_000)
    async with reading(ledger) as mirror:

        def work() -> None:
            for number in range(500):
                ledger.record([KvStored((number,), 0), KvRemoved((number - 1,))])

        thread = threading.Thread(target=work)
        thread.start()
        await caught_up(mirror, 500)
        thread.join()
        assert mirror.parents == {499: 0}


async def test_a_fresh_start_replaces_what_readers_know() -> None:
    ledger = KvLedger()
    async with reading(ledger) as mirror:
        ledger.record([KvStored((1, 2), 0), KvStored((7,), 0, HOST)])
        ledger.record_afresh([KvStored((3,), 0)])
        await caught_up(mirror, 2)
        assert mirror.blocks == {3: (0, GPU)}
        assert mirror.snapshots == 2


async def test_a_block_that_moves_is_in_one_tier() -> None:
    ledger = KvLedger()
    ledger.record([KvStored((1, 2), 0)])
    ledger.record([KvStored((2,), 1, HOST)])
    async with reading(ledger) as mirror:
        assert mirror.blocks == {1: (0, GPU), 2: (1, HOST)}
        ledger.record([KvStored((2,), 1)])
        await caught_up(mirror, 3)
        assert mirror.blocks == {1: (0, GPU), 2: (1, GPU)}


@given(drafted=st.lists(st.tuples(hashes, hashes, st.one_of(tiers, st.none())), max_size=20))
def test_a_draft_says_the_same_in_fewer_events(drafted: list[tuple[int, int, int | None]]) -> None:
    draft = KvDraft()
    one_by_one: list[Change] = []
    for block_hash, parent, tier in drafted:
        if tier is None:
            draft.remove(block_hash)
            one_by_one.append(KvRemoved((block_hash,)))
        else:
            draft.store(block_hash, parent, tier)
            one_by_one.append(KvStored((block_hash,), parent, tier))
    said = draft.finish()
    assert content_after([(False, said)]) == content_after([(False, one_by_one)])
    assert len(said) <= len(drafted)
    assert draft.finish() == []


def test_a_chain_is_one_event() -> None:
    draft = KvDraft()
    for block_hash in (1, 2, 3):
        draft.store(block_hash, block_hash - 1)
    draft.store(4, 3, HOST)
    draft.remove(1)
    draft.remove(9)
    assert draft.finish() == [KvStored((1, 2, 3), 0), KvStored((4,), 3, HOST), KvRemoved((1, 9))]


@given(event=st.one_of(events, st.just([KvSnapshot((1, 2), (0, 1), (0, 1))])), sequence=st.integers(0, 2**40))
def test_batches_survive_the_wire(event: list[KvEvent], sequence: int) -> None:
    batch = KvEventBatch(sequence, tuple(event))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KvEventBatch) == batch


def test_events_of_an_engine_that_knows_no_tiers_are_of_the_gpu() -> None:
    plain = msgspec.msgpack.encode([7, [["s", [1, 2], 0], ["a", [3], [0]]]])
    batch = msgspec.msgpack.decode(plain, type=KvEventBatch)
    assert batch == KvEventBatch(7, (KvStored((1, 2), 0, GPU), KvSnapshot((3,), (0,))))
