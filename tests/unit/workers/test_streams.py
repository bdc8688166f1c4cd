"""StreamGuard: streams are cut whatever the engine does, and nobody's task is left cancelled."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial

import pytest

from serve.core.request import PrefillInfo, TokenDelta
from serve.errors import EngineDead, RequestError, StreamLost
from serve.workers.streams import StreamGuard

Source = Callable[[], AsyncGenerator[TokenDelta, None]]


class Bench:
    """A guard, and what it tells."""

    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.prefills: list[tuple[int, float]] = []
        self.now_s = 0.0
        self.guard = StreamGuard(
            self.died, lambda tokens, seconds: self.prefills.append((tokens, seconds)), lambda: self.now_s
        )
        self.guard.open()

    def died(self, reason: str) -> None:
        self.deaths.append(reason)
        self.guard.close(reason)  # as a group does


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def endless() -> AsyncGenerator[TokenDelta, None]:
    yield TokenDelta((1,), prefill=PrefillInfo(cached_tokens=4, prefill_s=0.5))
    await asyncio.Event().wait()


async def steady() -> AsyncGenerator[TokenDelta, None]:
    while True:
        yield TokenDelta((1,))
        await asyncio.sleep(0)


async def read(bench: Bench, source: Source, seen: list[TokenDelta]) -> str:
    """Read to the end, then do something else that waits, as a shell does with an error."""
    try:
        async for delta in bench.guard.deltas_of(source, 10):
            seen.append(delta)  # noqa: PERF401
    except EngineDead as exc:
        for _ in range(5):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return str(exc)
    return ""


async def start(bench: Bench, source: Source, count: int = 3) -> list[asyncio.Task[str]]:
    seen: list[list[TokenDelta]] = [[] for _ in range(count)]
    tasks = [asyncio.create_task(read(bench, source, into)) for into in seen]
    while not all(seen):  # noqa: ASYNC110  # nothing announces it but the lists
        await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("source", [endless, steady])
async def test_closing_cuts_waiting_and_running_streams(bench: Bench, source: Source) -> None:
    tasks = await start(bench, source)
    bench.guard.close("rank 1 died")
    assert await asyncio.gather(*tasks) == ["rank 1 died"] * 3
    with pytest.raises(EngineDead, match="rank 1 died"):
        await anext(bench.guard.deltas_of(source, 1))


async def test_a_stream_that_tells_of_the_death_takes_the_others_with_it(bench: Bench) -> None:
    die = asyncio.Event()

    async def dying() -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((1,))
        await die.wait()
        raise EngineDead("lost a rank")

    others = await start(bench, endless)
    tellers = await start(bench, dying)
    die.set()
    assert await asyncio.gather(*others, *tellers) == ["lost a rank"] * 6
    assert bench.deaths[0] == "lost a rank"


async def test_an_engine_that_tells_of_its_death_in_the_reader_s_task_and_then_hangs(bench: Bench) -> None:
    async def hanging() -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((1,))
        bench.died("told from within")
        await asyncio.Event().wait()

    seen: list[TokenDelta] = []
    async with asyncio.timeout(10):
        assert await read(bench, hanging, seen) == "told from within"


async def test_an_engine_that_resists_cancellation_is_left_all_the_same(bench: Bench) -> None:
    async def resisting() -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((1,))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield TokenDelta((2,))

    tasks = await start(bench, resisting, 1)
    bench.guard.close("gone")
    assert await asyncio.gather(*tasks) == ["gone"]


async def test_somebody_else_s_cancellation_stays_one(bench: Bench) -> None:
    tasks = await start(bench, endless, 2)
    tasks[0].cancel()
    bench.guard.close("gone")
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)


async def test_a_timeout_around_a_stream_works(bench: Bench) -> None:
    async def drain() -> None:
        async with asyncio.timeout(0.05):
            async for _ in bench.guard.deltas_of(endless, 10):
                pass

    with pytest.raises(TimeoutError):
        await drain()
    assert bench.guard.waiting == 0


async def test_each_delta_may_be_asked_for_by_another_task(bench: Bench) -> None:
    stream = bench.guard.deltas_of(endless, 10)
    await asyncio.create_task(asyncio.wait_for(anext(stream), 10))
    second = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    bench.guard.close("gone")
    with pytest.raises(EngineDead, match="gone"):
        await second


async def test_what_the_watchdog_is_told(bench: Bench) -> None:
    stream = bench.guard.deltas_of(endless, 10)
    waiting = asyncio.ensure_future(anext(stream))
    assert (bench.guard.waiting, bench.guard.pending_tokens, bench.guard.deltas) == (0, 0, 0)
    await waiting
    assert (bench.guard.waiting, bench.guard.pending_tokens, bench.guard.deltas) == (0, 0, 1)  # it reads
    assert bench.prefills == [(6, 0.0)]  # by the clock of this side
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert bench.guard.waiting == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bench.guard.waiting == 0


async def test_a_prompt_is_pending_until_its_first_delta(bench: Bench) -> None:
    begin = asyncio.Event()

    async def late() -> AsyncGenerator[TokenDelta, None]:
        await begin.wait()
        yield TokenDelta((1,), prefill=PrefillInfo())

    first = asyncio.ensure_future(anext(bench.guard.deltas_of(late, 1000)))
    await asyncio.sleep(0)
    assert bench.guard.pending_tokens == 1000
    begin.set()
    await first
    assert bench.guard.pending_tokens == 0


async def test_errors_of_a_request_pass(bench: Bench) -> None:
    async def refusing() -> AsyncGenerator[TokenDelta, None]:
        for error in (RequestError("too long"),):
            raise error
        yield TokenDelta()

    with pytest.raises(RequestError, match="too long"):
        await anext(bench.guard.deltas_of(refusing, 1))
    assert bench.deaths == []


async def test_closing_a_stream_closes_its_source(bench: Bench) -> None:
    closed: list[bool] = []

    async def source() -> AsyncGenerator[TokenDelta, None]:
        try:
            while True:
                yield TokenDelta((1,))
        finally:
            closed.append(True)

    stream = bench.guard.deltas_of(source, 1)
    await anext(stream)
    await stream.aclose()
    assert closed == [True]


async def test_other_feeds_end_with_the_group(bench: Bench) -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.Event().wait()

    feed = bench.guard.items_of(numbers)
    assert await anext(feed) == 1
    second = asyncio.ensure_future(anext(feed))
    await asyncio.sleep(0)
    bench.guard.close("gone")
    with pytest.raises(EngineDead, match="gone"):
        await second
    assert bench.deaths == []


async def test_the_time_in_the_queue_is_not_the_time_of_a_prompt(bench: Bench) -> None:
    """Each prompt takes a second; the engine tells the last that it took three."""
    turns = [asyncio.Event() for _ in range(3)]

    async def queued(place: int) -> AsyncGenerator[TokenDelta, None]:
        await turns[place].wait()
        yield TokenDelta((1,), prefill=PrefillInfo(prefill_s=place + 1.0))

    streams = [bench.guard.deltas_of(partial(queued, place), 10) for place in range(3)]
    readers = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    assert (bench.guard.pending_tokens, bench.guard.longest_tokens) == (30, 10)
    for turn, reader in zip(turns, readers, strict=True):
        bench.now_s += 1.0
        turn.set()
        await reader
    assert bench.prefills == [(10, 1.0)] * 3
    for stream in streams:
        await stream.aclose()


async def test_an_engine_that_knows_its_queue_is_believed(bench: Bench) -> None:
    async def source() -> AsyncGenerator[TokenDelta, None]:
        bench.now_s += 60.0
        yield TokenDelta((1,), prefill=PrefillInfo(queue_s=59.0, prefill_s=1.0))

    assert len([delta async for delta in bench.guard.deltas_of(source, 10)]) == 1
    assert bench.prefills == [(10, 1.0)]


async def test_a_lost_stream_is_lost_alone(bench: Bench) -> None:
    async def odd() -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((1,))
        raise StreamLost("2 logprobs for 3 tokens")

    assert await read(bench, odd, []) == "2 logprobs for 3 tokens"
    bench.guard.check()
    assert not bench.deaths
