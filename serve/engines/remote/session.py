"""ReplicaSession: the hosting side of one connection: carries out what the replica asks for, and reports."""

import asyncio
import logging
from contextlib import aclosing, suppress

from serve.core.kv_events import KvEventBatch
from serve.core.request import GenerateRequest, TokenDelta, merge_deltas
from serve.engines.protocol import Engine
from serve.engines.remote.link import FrameLink
from serve.engines.remote.wire import (
    Answer,
    Cancel,
    Command,
    Failed,
    Follow,
    Generate,
    Report,
    Start,
    Started,
    Stop,
    Stopped,
    Unfollow,
    WireError,
    decode_commands,
    error_to_wire,
    pack,
    stats_to_wire,
)
from serve.errors import EngineDead, RayTRTError, StreamLost

logger = logging.getLogger(__name__)

BEAT_S = 0.5
WATCH_S = 0.1  # how soon load and health that changed without a delta are told
GOODBYE_TIMEOUT_S = 2.0


class ReplicaSession:
    """The replica that came: its sequences, and what it is to be told at the end of this event-loop turn.

    Args:
        engine: Not started.
        link: To the replica.
    """

    def __init__(self, engine: Engine, link: FrameLink) -> None:
        self._engine = engine
        self._link = link
        self._deltas: dict[int, TokenDelta] = {}
        self._errors: dict[int, WireError] = {}
        self._kv: list[tuple[int, KvEventBatch]] = []
        self._answer: Answer | None = None
        self._beat = False
        self._taken = 0
        self._sent: tuple[tuple[int | float, ...], str | None] | None = None
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._last_of: dict[str, asyncio.Task[None]] = {}  # by request id, the sequence that came last
        self._feeds: dict[int, asyncio.Task[None]] = {}
        self._starting: asyncio.Task[None] | None = None
        self._is_started = False
        self._end = asyncio.Event()

    async def run(self, stop_timeout_s: float) -> None:
        """Serve until the replica is gone, or asks to stop; then stop the engine."""
        pulse = asyncio.ensure_future(self._pulse())
        await self._end.wait()
        if self._link.closed.is_set():  # nobody is there to be told that they ended
            await _cancel(*self._streams.values(), *self._feeds.values())
        await stop_within(self._engine, stop_timeout_s)
        await _cancel(pulse, *self._streams.values(), *self._feeds.values(), *filter(None, [self._starting]))
        self._answer = Stopped()
        self._link.flush_soon()
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await self._link.closed.wait()
        self._link.abort("the engine was stopped")

    def lost(self, reason: str) -> None:
        """The connection has ended."""
        if not self._end.is_set():
            logger.warning("The replica is gone (%s); stopping its engine.", reason)
        self._end.set()

    def receive(self, body: bytes) -> None:
        """Carry out what the replica asks for."""
        for command in decode_commands(body).items:
            self._obey(command)
        self._link.flush_soon()  # its turn comes after the first step of every sequence begun here

    def _obey(self, command: Command) -> None:
        match command:
            case Generate(stream, request):
                self._taken += 1
                self._begin(stream, request)
            case Cancel(stream):
                self._cancel_one(self._streams.get(stream))
            case Follow(feed):
                self._feeds[feed] = asyncio.ensure_future(self._follow(feed))
            case Unfollow(feed):
                self._cancel_one(self._feeds.pop(feed, None))
            case Start() if self._starting is None:
                self._starting = asyncio.ensure_future(self._start())
            case Stop():
                self._end.set()

    def compose(self) -> bytes | None:
        """Return what there is to tell."""
        stats = stats_to_wire(self._engine.stats())
        dead = self._sickness()
        if not (self._deltas or self._errors or self._kv or self._beat or self._answer or self._sent != (stats, dead)):
            return None
        report = Report(
            tuple(self._deltas.items()),
            tuple(self._errors.items()),
            tuple(self._kv),
            self._taken,
            stats,
            dead,
            self._beat,
            self._answer,
        )
        self._deltas.clear()
        self._errors.clear()
        self._kv.clear()
        self._beat, self._answer, self._sent = False, None, (stats, dead)
        return pack(report)

    def _sickness(self) -> str | None:
        if self._is_started:
            try:
                self._engine.check_health()
            except EngineDead as exc:
                return str(exc)
        return None

    async def _start(self) -> None:
        try:
            await self._engine.start()
            self._is_started = True
            self._answer = Started(self._engine.info)
        except Exception as exc:
            if not isinstance(exc, RayTRTError):
                logger.exception("The engine does not start.")
            self._answer = Failed(error_to_wire(exc))
        self._link.flush_soon()

    async def _pulse(self) -> None:
        loop = asyncio.get_running_loop()
        beat_s = loop.time()
        while True:
            if loop.time() >= beat_s:
                self._beat = True
                beat_s = loop.time() + BEAT_S
            self._link.flush_soon()  # sends nothing if nothing is new
            await asyncio.sleep(WATCH_S)

    # Sequences

    def _begin(self, stream: int, request: GenerateRequest) -> None:
        before = self._last_of.get(request.request_id)
        if before is not None and not before.cancelling():
            before = None  # it is in flight: the engine refuses a second one under its id
        task = asyncio.ensure_future(self._run_stream(stream, request, before))
        self._streams[stream] = self._last_of[request.request_id] = task
        task.add_done_callback(lambda _: self._forget(stream, request.request_id, task))

    def _forget(self, stream: int, request_id: str, task: asyncio.Task[None]) -> None:
        del self._streams[stream]
        if self._last_of.get(request_id) is task:
            del self._last_of[request_id]
        self._link.flush_soon()  # what it held is free

    async def _run_stream(self, stream: int, request: GenerateRequest, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    queued = self._deltas.get(stream)
                    self._deltas[stream] = delta if queued is None else merge_deltas(queued, delta)
                    self._link.flush_soon()
                    if delta.finish_reason is not None:
                        return
            raise StreamLost("the engine ended a sequence without a reason")
        except Exception as exc:
            if not isinstance(exc, RayTRTError):
                logger.exception("Sequence %s failed.", request.request_id)
                exc = StreamLost(f"internal error of the engine: {type(exc).__name__}: {exc}")  # this sequence alone
            self._errors[stream] = error_to_wire(exc)

    async def _follow(self, feed: int) -> None:
        # A replica that does not read is waited for: to a reader that fell behind the engine gives a snapshot.
        try:
            async with aclosing(self._engine.kv_events()) as batches:
                async for batch in batches:
                    self._kv.append((feed, batch))
                    self._link.flush_soon()
                    await self._link.room()
        except Exception:
            logger.exception("The engine tells no KV events any more.")

    @staticmethod
    def _cancel_one(task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()


async def stop_within(engine: Engine, timeout_s: float) -> None:
    """Stop an engine; one that takes too long is left to the end of the process."""
    try:
        async with asyncio.timeout(timeout_s):
            await engine.stop()
    except TimeoutError:
        logger.error("The engine did not stop within %.0f s.", timeout_s)
    except Exception:
        logger.exception("The engine did not stop as it should.")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=GOODBYE_TIMEOUT_S)
