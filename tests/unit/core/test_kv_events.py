"""KvLedger: every reader can reconstruct the content, whenever it begins and however slow it is."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from serve.core.kv_events import KvEventBatch, KvLedger, KvRemoved, KvSnapshot, KvStored

hashes = st.integers(0, 30)
events = st.lists(
    st.one_of(
        st.builds(KvStored, st.lists(hashes, min_size=1, max_size=4).map(tuple), hashes),
        st.builds(KvRemoved, st.lists(hashes, min_size=1, max_size=4).map(tuple)),
    ),
    max_size=4,
)
steps = st.lists(events, max_size=12)


@dataclass
class Mirror:
    """A consumer's copy of the content."""

    parents: dict[int, int] = field(default_factory=dict)
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
            if isinstance(event, KvSnapshot):
                self.parents = dict(zip(event.block_hashes, event.parents, strict=True))
            else:
                apply(self.parents, event)


def apply(parents: dict[int, int], event: KvStored | KvRemoved) -> None:
    """What an event means, said in the simplest way."""
    if isinstance(event, KvRemoved):
        for block_hash in event.block_hashes:
            parents.pop(block_hash, None)
        return
    for i, block_hash in enumerate(event.block_hashes):
        parents[block_hash] = event.block_hashes[i - 1] if i else event.parent


def content_after(recorded: Iterable[list[KvStored | KvRemoved]]) -> dict[int, int]:
    parents: dict[int, int] = {}
    for step in recorded:
        for event in step:
            apply(parents, event)
    return parents


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
def test_readers_see_the_content(
    recorded: list[list[KvStored | KvRemoved]], begin: int, max_lag: int, breaks: set[int]
) -> None:
    async def scenario() -> None:
        ledger = KvLedger(max_lag)
        for step in recorded[:begin]:
            ledger.record(step)
        async with reading(ledger) as mirror:
            assert mirror.parents == content_after(recorded[:begin])
            for i, step in enumerate(recorded[begin:]):
                ledger.record(step)
                if i in breaks:  # let the reader catch up, or let it fall behind
                    await asyncio.sleep(0)
            await caught_up(mirror, sum(1 for step in recorded if step))
            assert mirror.parents == content_after(recorded)
            assert ledger.content() == frozenset(mirror.parents)

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


@given(event=st.one_of(events, st.just([KvSnapshot((1, 2), (0, 1))])), sequence=st.integers(0, 2**40))
def test_batches_survive_the_wire(event: list[KvStored | KvRemoved], sequence: int) -> None:
    batch = KvEventBatch(sequence, tuple(event))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=KvEventBatch) == batch
