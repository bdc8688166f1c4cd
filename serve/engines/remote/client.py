"""RemoteEngine: the engine of another process of this node, behind the Engine port."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

from serve.core.delta_inbox import DeltaInbox
from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, TokenDelta
from serve.engines.protocol import EngineInfo, EngineStats
from serve.engines.remote.kv_feed import KvFeed
from serve.engines.remote.link import FrameLink
from serve.engines.remote.wire import (
    Answer,
    Cancel,
    Command,
    Commands,
    Failed,
    Follow,
    Generate,
    Hello,
    Report,
    Start,
    Started,
    Stop,
    Stopped,
    Unfollow,
    decode_report,
    error_from_wire,
    pack,
    release,
    stats_from_wire,
)
from serve.errors import EngineDead, Overloaded

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 * 2**20  # a host that lives takes requests within microseconds
MAX_KV_LAG = 1024


def _ignore(*_: object) -> None:
    """Stand in for a callback that nobody gave."""


class _Stream(DeltaInbox):
    """One sequence."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.ended = False  # the host has nothing more to tell of it


class RemoteEngine:
    """Engine port over a socket. `serve.engines.remote.server.EngineServer` is the other end.

    Args:
        path: The socket.
        secret: What its server was given.
        on_beat: Called twice a second while the host's event loop runs.
        on_death: Called once with the reason, unless `stop` was called before.
        connect_timeout_s: How long the server may take to accept.
        stop_timeout_s: How long `stop` waits for the engine; what it holds beyond that is freed with its process.
        max_unsent_bytes: Of requests that the host has not read; beyond it they are refused.
        max_kv_lag: Batches of KV events that a consumer may be behind before it gets a snapshot instead.
    """

    def __init__(
        self,
        path: Path,
        secret: str,
        *,
        on_beat: Callable[[], None] = _ignore,
        on_death: Callable[[str], None] = _ignore,
        connect_timeout_s: float = 10.0,
        stop_timeout_s: float = 35.0,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
        max_kv_lag: int = MAX_KV_LAG,
    ) -> None:
        self._path = path
        self._secret = secret
        self._on_beat = on_beat
        self._on_death = on_death
        self._connect_timeout_s = connect_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._max_unsent_bytes = max_unsent_bytes
        self._max_kv_lag = max_kv_lag
        self._link: FrameLink | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._dead: str | None = None  # why, once it is
        self._commands: list[Command] = []
        self._unsent_bytes = 0  # prompts among them
        self._streams: dict[int, _Stream] = {}
        self._feeds: dict[int, KvFeed] = {}
        self._numbers = 0
        self._sent = 0  # Generate commands …
        self._taken = 0  # … and how many of them the host's statistics know of
        self._starting: asyncio.Future[EngineInfo] | None = None
        self._stopping = False

    @property
    def info(self) -> EngineInfo:
        """What is fixed once the engine has started."""
        assert self._info is not None, "start() comes first"
        return self._info

    async def start(self) -> None:
        """Connect, and start the engine at the other end; raises what its `start` raises."""
        if self._stopping:
            raise EngineDead("the engine was stopped")
        link = await self._connect()
        self._starting = asyncio.get_running_loop().create_future()
        link.write(pack(Hello(self._secret, release())))
        self._send(Start())
        try:
            self._info = await self._starting
        except asyncio.CancelledError:
            link.abort("nobody waits for the engine any more")
            raise

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens, as the port says."""
        stream = self._open(request)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            del self._streams[stream.number]
            if not stream.ended:
                self._send(Cancel(stream.number))

    def stats(self) -> EngineStats:
        """Return the last load that was told, and what the engine has not heard of yet as waiting."""
        on_the_way = self._sent - self._taken if self._dead is None else 0
        return replace(self._stats, waiting=self._stats.waiting + on_the_way) if on_the_way else self._stats

    async def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache, as the port says; raises EngineDead at the engine's end."""
        feed = KvFeed(self._max_kv_lag)
        try:
            while True:
                self.check_health()
                if not feed.number:
                    self._follow(feed)
                batch = await feed.next()
                if batch is not None:
                    yield batch
        finally:
            self._unfollow(feed)

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine said that it is dead, or its process is gone."""
        if self._dead is not None or self._info is None:
            raise EngineDead(self._dead or "the engine has not been started")

    async def stop(self) -> None:
        """Stop the engine and leave it; its process ends with that."""
        self._stopping = True
        self._fail("the engine was stopped")
        link = self._link
        if link is None:
            return
        self._send(Stop())
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await link.closed.wait()
        except TimeoutError:
            logger.error("The engine's host did not stop it within %.0f s.", self._stop_timeout_s)
        finally:
            link.abort("the engine was stopped")

    # What is sent

    async def _connect(self) -> FrameLink:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, self._link = await loop.create_unix_connection(
                    lambda: FrameLink(self._receive, self._compose, self._lost), str(self._path)
                )
        except (OSError, TimeoutError) as exc:
            self._dead = f"the engine's host cannot be reached at {self._path} ({exc or 'it does not accept'})"
            raise EngineDead(self._dead) from exc
        return self._link

    def _send(self, command: Command) -> None:
        if self._link is not None:
            self._commands.append(command)
            self._link.flush_soon()

    def _compose(self) -> bytes | None:
        if not self._commands:
            return None
        items, self._commands, self._unsent_bytes = tuple(self._commands), [], 0
        return pack(Commands(items))

    def _open(self, request: GenerateRequest) -> _Stream:
        self.check_health()
        assert self._link is not None, "only a started engine is healthy"
        if self._link.unwritten_bytes + self._unsent_bytes > self._max_unsent_bytes:
            raise Overloaded("the engine's host does not take requests: it is busy, or hangs")
        stream = _Stream(self._next_number())
        self._streams[stream.number] = stream
        self._send(Generate(stream.number, request))
        self._unsent_bytes += len(request.prompt)
        self._sent += 1
        return stream

    def _follow(self, feed: KvFeed) -> None:
        feed.number = self._next_number()
        self._feeds[feed.number] = feed
        self._send(Follow(feed.number))

    def _unfollow(self, feed: KvFeed) -> None:
        if self._feeds.pop(feed.number, None) is not None:
            self._send(Unfollow(feed.number))
        feed.number = 0

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    # What is told

    def _receive(self, body: bytes) -> None:
        report = decode_report(body)
        self._taken = report.taken
        if report.stats is not None and self._dead is None:
            self._stats = stats_from_wire(report.stats)
        self._deliver(report)
        if report.beat:
            self._on_beat()
        if report.answer is not None:
            self._take_answer(report.answer)
        if report.dead is not None:
            self._die(report.dead)

    def _deliver(self, report: Report) -> None:
        for number, delta in report.deltas:
            stream = self._streams.get(number)
            if stream is not None:
                stream.ended = delta.finish_reason is not None
                stream.push(delta)
        for number, error in report.errors:
            stream = self._streams.get(number)
            if stream is not None:
                stream.ended = True
                stream.fail(error_from_wire(error))
        for number, batch in report.kv:
            feed = self._feeds.get(number)
            if feed is not None and not feed.push(batch):
                self._unfollow(feed)  # it asks for a snapshot when its consumer is back

    def _take_answer(self, answer: Answer) -> None:
        match answer:
            case Started(info):
                if self._starting is not None and not self._starting.done():
                    self._starting.set_result(info)
            case Failed(error):
                reason = error_from_wire(error)
                self._dead = self._dead or str(reason)
                if self._starting is not None and not self._starting.done():
                    self._starting.set_exception(reason)
            case Stopped():
                if self._link is not None:
                    self._link.close()

    def _lost(self, reason: str) -> None:
        self._die(f"the process that hosts the engine is gone: {reason}")

    def _die(self, reason: str) -> None:
        is_new = self._dead is None
        self._fail(reason)
        if is_new and not self._stopping:
            self._on_death(reason)

    def _fail(self, reason: str) -> None:
        """End everything at once."""
        self._dead = reason = self._dead or reason  # the first reason is what matters
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(EngineDead(reason))
        for stream in self._streams.values():
            stream.fail(EngineDead(reason))
        for feed in self._feeds.values():
            feed.fail(EngineDead(reason))
        self._stats = replace(self._stats, running=0, waiting=0, used_blocks=0, queued_prefill_tokens=0)
