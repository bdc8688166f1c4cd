"""EventPublisher: a replica's end of the event plane. Says what its cache holds and how busy it is, to all gateways.

It runs on the replica's event loop and never waits for a gateway: what a slow one does not take is dropped for it
(ZMQ's high-water mark), and it asks for a snapshot when it notices.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import zmq

from serve.core.kv_content import KvContent
from serve.core.kv_events import KvEventBatch, KvSnapshot
from serve.core.request import GenerateRequest, TokenDelta
from serve.core.routing.load import LoadReport
from serve.engines.protocol import EngineInfo, EngineStats
from serve.errors import ConfigError, EngineDead
from serve.router.binding import bind
from serve.router.load_reporter import LoadReporter
from serve.router.snapshot_server import Snapshot, SnapshotServer
from serve.router.wire import Facts, Hello, KvNews, LoadNews, PlaneAddress, encode, facts_to_metadata, source_of
from serve.router.zmq_watch import make_socket

logger = logging.getLogger(__name__)

KV_INTERVAL_S = 0.01  # between messages of KV events; what is queued meanwhile goes into one
LOAD_INTERVAL_S = 0.025  # between load messages when sequences come, begin or go, or prompts are computed
PROGRESS_INTERVAL_S = 0.1  # between them when all that happens is output
HEARTBEAT_S = 0.5
MAX_MESSAGE_BLOCKS = 1024  # one batch may have more
MAX_BATCH_BLOCKS = 16_384  # a batch with more is not published: whoever needs it asks for a snapshot
_MAX_QUEUED = 256  # messages for one gateway: two seconds of a busy replica
_RETRY_S = 0.5
_FIRST_BATCH_S = 10.0  # an engine says what it holds at once; one that does not must not keep its replica from starting


class Source(Protocol):
    """The part of an engine that is published."""

    @property
    def info(self) -> EngineInfo:
        """What is fixed."""

    def stats(self) -> EngineStats:
        """Return the load."""

    def kv_events(self) -> AsyncGenerator[KvEventBatch, None]:
        """Stream the content of the KV cache, a snapshot first."""


class EventPublisher:
    """Publishes one engine. `start`, then `accepted`, `delta` and `ended` for each sequence, then `stop`.

    Args:
        replica_id: Its id.
        host: This node's address, as the cluster sees it.
        engine: Started.
    """

    def __init__(self, replica_id: str, host: str, engine: Source) -> None:
        self._source = source_of(replica_id)
        self._host = host
        self._engine = engine
        info = engine.info
        self._facts = Facts(info.engine, info.tokens_per_block, info.total_blocks, info.context_tokens)
        self._reporter = LoadReporter(info.tokens_per_block)
        self._content = KvContent()
        self._secret = secrets.token_hex(16)
        self._epoch = secrets.randbits(63) | 1
        self._number = 0
        self._read_sequence = 0  # of the last batch in `_content`
        self._sequence = 0  # of the last batch published
        self._pending: list[KvEventBatch] = []
        self._kv_timer: asyncio.Handle | None = None
        self._kv_sent_s = 0.0
        self._load_timer: asyncio.Handle | None = None
        self._load_sent_s = 0.0
        self._load_urgency = 0.0  # the interval that the next load message was timed with
        self._last_load: LoadNews | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._news: zmq.Socket[bytes] | None = None
        self._snapshots: SnapshotServer | None = None
        self._follower: asyncio.Task[None] | None = None
        self._has_read = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endpoint = ""

    async def start(self) -> None:
        """Bind to free ports of the host, and begin to follow the engine.

        Where the address cannot be bound, an error is logged and nothing published: gateways count for themselves what
        they send to such a replica.
        """
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        try:
            self._news = make_socket(self._context, zmq.PUB)
            self._news.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
            self._endpoint = bind(self._news, self._host)
            self._snapshots = SnapshotServer(self._context, self._secret, self._hello, self._pack)
            self._snapshots.start(self._host)
        except ConfigError as exc:
            self._close_sockets()
            logger.error("%s. Until then it is routed to without what its cache holds and how busy it is.", exc)
            return
        except BaseException:
            self._close_sockets()
            raise
        self._follower = self._loop.create_task(self._follow())
        # Who asks from now on has to get the content, and not the nothing that is known before the first batch.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_BATCH_S):
                await self._has_read.wait()
        self._send_load()

    @property
    def address(self) -> PlaneAddress | None:
        """What gateways have to know; None if nothing is published."""
        if self._news is None or self._snapshots is None:
            return None
        return PlaneAddress(self._endpoint, self._snapshots.endpoint, self._secret, self._epoch, self._facts)

    def metadata(self) -> dict[str, Any]:
        """Return what the replica has to say of itself in Ray Serve: the facts, and its address if there is one."""
        address = self.address
        return address.to_metadata() if address is not None else facts_to_metadata(self._facts)

    async def stop(self) -> None:
        """Close everything. Safe to call twice, or before `start`."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        for timer in (self._kv_timer, self._load_timer):
            if timer is not None:
                timer.cancel()
        self._kv_timer = self._load_timer = None
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._snapshots is not None:
            self._snapshots.close()
        if self._news is not None:
            self._news.close(linger=0)
        if self._context is not None:
            self._context.term()
        self._news = self._context = None

    # Load

    def accepted(self, request: GenerateRequest) -> None:
        """A sequence is about to be given to the engine."""
        if self._news is not None:
            self._reporter.accepted(request)
            self._report_within(LOAD_INTERVAL_S)

    def delta(self, request: GenerateRequest, delta: TokenDelta) -> None:
        """A sequence got tokens."""
        is_first = self._reporter.delta(request, delta)
        self._report_within(LOAD_INTERVAL_S if is_first else PROGRESS_INTERVAL_S)

    def ended(self, request: GenerateRequest) -> None:
        """A sequence is over."""
        self._reporter.ended(request)
        self._report_within(LOAD_INTERVAL_S)

    def _report_within(self, interval_s: float) -> None:
        """Let the next load message be sent `interval_s` after the last, unless it will be sooner."""
        if interval_s < self._load_urgency:
            self._time_load(interval_s)

    def _time_load(self, interval_s: float) -> None:
        if self._loop is None or self._news is None:
            return  # not started, or stopped
        if self._load_timer is not None:
            self._load_timer.cancel()
        self._load_urgency = interval_s
        delay_s = max(0.0, self._load_sent_s + interval_s - self._loop.time())
        self._load_timer = self._loop.call_later(delay_s, self._send_load)

    def _send_load(self) -> None:
        assert self._loop is not None
        self._flush()
        report = self._reporter.report(self._engine.stats())
        self._load_sent_s = self._loop.time()
        self._publish_load(report)
        # Prompts are computed without a word to anybody, and how much is left of them is what gateways ask for most.
        self._time_load(LOAD_INTERVAL_S if report.queued_prefill_tokens else HEARTBEAT_S)

    def _publish_load(self, report: LoadReport) -> None:
        self._number += 1
        load = LoadNews(self._source, self._epoch, self._number, self._sequence, report, time.monotonic())
        self._last_load = load
        self._send(encode(load))

    # KV events

    async def _follow(self) -> None:
        """Read the engine's KV events for as long as it lives."""
        while True:
            try:
                await self._read()
                return
            except EngineDead as exc:
                logger.info("No more KV events: %s", exc)
                self._has_read.set()
                return
            except Exception:
                logger.exception("Reading KV events failed; starting again.")
            await asyncio.sleep(_RETRY_S)

    async def _read(self) -> None:
        if self._has_read.is_set():
            self._enter_epoch()  # whether the engine is the same as before, nobody says
        async with aclosing(self._engine.kv_events()) as batches:
            async for batch in batches:
                if not isinstance(batch.events[0], KvSnapshot) and batch.sequence != self._read_sequence + 1:
                    raise RuntimeError(f"KV event batch {batch.sequence} came after {self._read_sequence}")
                self._take(batch)

    def _take(self, batch: KvEventBatch) -> None:
        for event in batch.events:
            self._content.apply(event)
        self._read_sequence = batch.sequence
        self._has_read.set()
        self._pending.append(batch)
        if self._kv_timer is None and self._loop is not None:
            delay_s = self._kv_sent_s + KV_INTERVAL_S - self._loop.time()
            # Not at once: what else the engine has told already goes into the same message.
            flush = self._flush
            self._kv_timer = self._loop.call_later(delay_s, flush) if delay_s > 0 else self._loop.call_soon(flush)

    def _enter_epoch(self) -> None:
        """Begin to count anew, from an empty cache."""
        self._flush()
        self._epoch = secrets.randbits(63) | 1
        self._number = self._sequence = self._read_sequence = 0
        self._content = KvContent()
        self._reporter.forget_totals()
        self._last_load = None

    def _flush(self) -> None:
        """Publish what is pending."""
        if self._kv_timer is not None:
            self._kv_timer.cancel()
            self._kv_timer = None
        if not self._pending or self._loop is None:
            return
        self._kv_sent_s = self._loop.time()
        message: list[KvEventBatch] = []
        message_blocks = 0
        for batch in self._pending:
            blocks = sum(len(event.block_hashes) for event in batch.events)
            if message and message_blocks + blocks > MAX_MESSAGE_BLOCKS:
                self._publish_batches(message)
                message, message_blocks = [], 0
            if blocks > MAX_BATCH_BLOCKS:
                # Left out: gateways find out by the number of the next message that something is missing.
                continue
            message.append(batch)
            message_blocks += blocks
        self._publish_batches(message)
        self._sequence = self._pending[-1].sequence
        self._pending.clear()

    def _publish_batches(self, batches: list[KvEventBatch]) -> None:
        if batches:
            self._number += 1
            self._send(encode(KvNews(self._source, self._epoch, self._number, tuple(batches))))

    def _send(self, frame: bytes) -> None:
        if self._news is not None:
            with contextlib.suppress(zmq.Again):  # PUB drops by itself, and never says so
                self._news.send(frame, zmq.NOBLOCK)

    # Snapshots

    def _hello(self) -> Hello:
        return Hello(self._source, self._epoch, self._facts, self._last_load)

    def _pack(self) -> Snapshot:
        return Snapshot(self._source, self._epoch, self._read_sequence, self._content.pack())
