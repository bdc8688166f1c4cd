"""fan_in: several streams as one, in the order of arrival; none is lost, and none goes on after another failed."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

_T = TypeVar("_T")


def fan_in(streams: Sequence[AsyncGenerator[_T, None]], merge: Callable[[_T, _T], _T]) -> AsyncGenerator[_T, None]:
    """Return one stream of the items of all.

    What a stream brings while the consumer is busy is merged to one item, so a slow consumer costs no memory for each
    item. The first error ends all. However it ends, every stream is closed before the returned generator is.

    Args:
        streams: At least one; closed with the returned generator.
        merge: Joins two consecutive items of one stream.
    """
    return streams[0] if len(streams) == 1 else _fan_in(streams, merge)


async def _fan_in(
    streams: Sequence[AsyncGenerator[_T, None]], merge: Callable[[_T, _T], _T]
) -> AsyncGenerator[_T, None]:
    ready: dict[int, _T] = {}
    wake = asyncio.Event()

    async def pump(number: int, stream: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    ready[number] = merge(ready[number], item) if number in ready else item
                    wake.set()
        finally:
            wake.set()

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        while True:
            await wake.wait()
            wake.clear()
            done = [task for task in tasks if task.done()]
            for task in done:
                task.result()  # raises what ended it
            batch, ready = ready, {}
            for item in batch.values():
                yield item
            if len(done) == len(tasks) and not ready:
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
