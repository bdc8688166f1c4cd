"""StreamGuard: the streams of one engine, counted for the watchdog, and cut all at once when the group fails.

A stream stays in the task of its reader: nothing is queued or copied for a delta. To cut it, that task is cancelled and
the cancellation turned into `EngineDead`, as `asyncio.timeout` turns its own into TimeoutError. An engine that hangs
cannot hold a stream that way.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from serve.core.request import PrefillInfo, TokenDelta
from serve.errors import EngineDead, StreamLost

T = TypeVar("T")


class _Stream:
    """One stream.

    Attributes:
        task: Who waits for the next item; None while the reader is busy with the one before.
        cancelling: Cancellations that the task had been asked for when it was cut; None until then.
        pending_tokens: Its prompt, until the first delta.
    """

    __slots__ = ("cancelling", "pending_tokens", "task")

    def __init__(self, pending_tokens: int) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.cancelling: int | None = None
        self.pending_tokens = pending_tokens

    def cut(self) -> None:
        if self.task is None or self.cancelling is not None:
            return
        if self.task is asyncio.current_task():
            # It is the engine, at work in this task, that tells of the death: cut once it waits again, if it does.
            asyncio.get_running_loop().call_soon(self.cut)
            return
        self.cancelling = self.task.cancelling()
        self.task.cancel()

    def was_cut_alone(self, task: asyncio.Task[Any]) -> bool:
        """Take back our cancellation; whether nobody else wants the task cancelled as well."""
        if self.cancelling is None:
            return False
        wanted, self.cancelling = self.cancelling, None
        return task.uncancel() <= wanted


class StreamGuard:
    """All streams of one engine.

    Args:
        on_death: Called with the reason when a stream says that the engine is dead.
        on_prefill: Called with the computed prompt tokens and their time in seconds, once a stream. Most engines cannot
            tell queueing from computing: the time is that since the prompt before was done, or the queue was empty.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        on_death: Callable[[str], None],
        on_prefill: Callable[[int, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_death = on_death
        self._on_prefill = on_prefill
        self._clock = clock
        self._streams: set[_Stream] = set()
        self._feeds: set[_Stream] = set()
        self._closed: str | None = "the engine has not been started"
        self._computing_since_s: float | None = None  # there are prompts, and none was done since then
        self.deltas = 0

    @property
    def waiting(self) -> int:
        """Streams that wait for the engine now."""
        return sum(stream.task is not None for stream in self._streams)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens of streams without a delta."""
        return sum(stream.pending_tokens for stream in self._streams)

    @property
    def longest_tokens(self) -> int:
        """The longest prompt of those."""
        return max((stream.pending_tokens for stream in self._streams), default=0)

    def open(self) -> None:
        """Let streams run."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Cut every stream, and refuse new ones."""
        self._closed = reason
        for stream in [*self._streams, *self._feeds]:
            stream.cut()

    def check(self) -> None:
        """Raise `EngineDead` if streams are refused."""
        if self._closed is not None:
            raise EngineDead(self._closed)

    async def deltas_of(
        self, make_source: Callable[[], AsyncGenerator[TokenDelta, None]], prompt_tokens: int
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream a sequence; the source is made when the first delta is asked for."""
        self.check()
        stream = _Stream(prompt_tokens)
        self._streams.add(stream)
        if self._computing_since_s is None and prompt_tokens:
            self._computing_since_s = self._clock()
        source = make_source()
        try:
            stream.task = asyncio.current_task()
            async for delta in source:
                if stream.cancelling is not None and stream.task is not None:
                    stream.was_cut_alone(stream.task)  # cut, and yet there is a delta: the engine caught it
                stream.task = None
                self.deltas += 1
                if delta.prefill is not None:
                    self._note_prefill(stream, delta.prefill)
                yield delta
                if self._closed is not None and delta.finish_reason is None:
                    raise EngineDead(self._closed)
                stream.task = asyncio.current_task()
        except asyncio.CancelledError:
            self._explain_cancellation(stream)
            raise
        except StreamLost:
            raise  # this one alone: the others go on, and so does the engine
        except EngineDead as exc:
            stream.task = None  # it is at its end, and need not be cut for what it is about to tell
            self._on_death(str(exc))
            raise
        finally:
            self._streams.discard(stream)
            if not self.pending_tokens:
                self._computing_since_s = None
            await self._leave(stream, source)

    async def items_of(self, make_source: Callable[[], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """Follow something else of the engine that ends with it, and says nothing about its progress."""
        self.check()
        feed = _Stream(0)
        self._feeds.add(feed)
        source = make_source()
        try:
            feed.task = asyncio.current_task()
            async for item in source:
                feed.task = None
                yield item
                self.check()
                feed.task = asyncio.current_task()
        except asyncio.CancelledError:
            self._explain_cancellation(feed)
            raise
        finally:
            self._feeds.discard(feed)
            await self._leave(feed, source)

    def _note_prefill(self, stream: _Stream, prefill: PrefillInfo) -> None:
        tokens, stream.pending_tokens = stream.pending_tokens - prefill.cached_tokens, 0
        now_s, since_s = self._clock(), self._computing_since_s
        seconds = prefill.prefill_s if since_s is None else now_s - since_s
        if prefill.queue_s > 0:  # it can tell
            seconds = min(seconds, prefill.prefill_s)
        self._computing_since_s = now_s if self.pending_tokens else None
        self._on_prefill(tokens, seconds)

    def _explain_cancellation(self, stream: _Stream) -> None:
        """Raise `EngineDead` instead, if it was we who cancelled."""
        task = stream.task
        if task is not None and stream.was_cut_alone(task):
            raise EngineDead(self._closed or "the engine is gone") from None

    async def _leave(self, stream: _Stream, source: AsyncGenerator[Any, None]) -> None:
        task, stream.task = stream.task, None
        if task is not None:
            stream.was_cut_alone(task)  # cut, but something else ended it first
        await source.aclose()
