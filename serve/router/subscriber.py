"""EventSubscriber: a gateway's end of the event plane. Hears all replicas of a model, on the gateway's event loop.

One SUB socket is connected to all replicas, which say in each message who they are. A DEALER socket to a replica is
opened when something of it is missing, and closed when nothing is. There is no thread but ZMQ's own; sockets are
drained without waiting, in turns of the loop that each have a time budget, so that streams go on meanwhile.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgspec
import zmq

from serve.router.replica_feed import EventSink, PlaneCounts, ReplicaFeed
from serve.router.wire import (
    PLANE_VERSION,
    Answer,
    News,
    OtherVersion,
    PlaneAddress,
    SnapshotRequest,
    decode_answer,
    decode_news,
    encode,
    source_of,
)
from serve.router.zmq_watch import ZmqWatch, make_socket

logger = logging.getLogger(__name__)

BUDGET_S = 0.002  # of one turn of the event loop; half of it for each of reading and handing on
TICK_S = 0.1
SILENT_S = 3.0  # six heartbeats
_MAX_NEWS_BYTES = 64 << 20
_MAX_QUEUED = 512  # messages of one replica; what is beyond is lost, and made up for by a snapshot
_MAX_SOCKETS = 8192
_Message = TypeVar("_Message")


class _Link:
    """A replica and, while something of it is missing, the socket to ask it."""

    def __init__(self, feed: ReplicaFeed, address: PlaneAddress) -> None:
        self.feed = feed
        self.address = address
        self.asker: ZmqWatch | None = None
        self.heard = False


class EventSubscriber:
    """Hears replicas, and tells a sink. Belongs to the event loop that the first `listen` runs on.

    Args:
        sink: Gets what they say.
        clock: In seconds; monotonic.
    """

    def __init__(self, sink: EventSink, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = PlaneCounts()
        self._sink = sink
        self._clock = clock
        self._identity = b"\x01" + secrets.token_bytes(8)  # a leading zero is reserved
        self._links: dict[str, _Link] = {}
        self._by_source: dict[int, _Link] = {}
        self._endpoints: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._news: ZmqWatch | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn_is_due = False
        self._to_read: dict[_Link, None] = {}
        self._at_work: dict[_Link, None] = {}
        self._versions_told: set[int] = set()

    def listen(self, replica_id: str, address: PlaneAddress) -> None:
        """Begin to hear a replica; what is known of it so far counts for nothing.

        Its address cannot be wrong in a way that fails here: one that nobody answers at is tried again for ever.
        """
        self.forget(replica_id)
        feed = ReplicaFeed(replica_id, self._sink, self.counts, self._clock())
        link = _Link(feed, address)
        news = self._news or self._start()
        try:
            if not self._endpoints[address.events]:
                news.socket.connect(address.events)
        except zmq.ZMQError as exc:
            logger.error("Replica %s cannot be heard at %r: %s.", replica_id, address.events, exc)
            return
        self._endpoints[address.events] += 1
        self._links[replica_id] = self._by_source[source_of(replica_id)] = link
        self._ask(link, feed.tick(self._clock()))

    def forget(self, replica_id: str) -> None:
        """Stop hearing a replica; harmless if it is unknown. The sink is told nothing."""
        link = self._links.pop(replica_id, None)
        if link is None:
            return
        del self._by_source[source_of(replica_id)]
        self._at_work.pop(link, None)
        self._close_asker(link)
        endpoint = link.address.events
        self._endpoints[endpoint] -= 1
        if not self._endpoints[endpoint]:
            del self._endpoints[endpoint]
            if self._news is not None:
                with contextlib.suppress(zmq.ZMQError):
                    self._news.socket.disconnect(endpoint)

    def close(self) -> None:
        """Stop hearing all. Safe to call twice."""
        for replica_id in list(self._links):
            self.forget(replica_id)
        if self._ticker is not None:
            self._ticker.cancel()
        if self._news is not None:
            self._news.close()
        if self._context is not None:
            self._context.term()
        self._news = self._context = self._ticker = None

    def _start(self) -> ZmqWatch:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        socket = make_socket(self._context, zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_NEWS_BYTES)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._news = ZmqWatch(socket, self._turn_soon)
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        return self._news

    # Turns

    def _turn(self) -> None:
        """Read what has come, and hand on what waits, for as long as the budget lasts."""
        self._turn_is_due = False
        if self._news is None:
            return
        end_s = self._clock() + BUDGET_S / 2
        is_more = self._drain(self._news, self._hear_news, end_s)
        for link in list(self._to_read):
            if link.asker is None or not self._drain(link.asker, self._hear_answer, end_s):
                self._to_read.pop(link, None)
        self._work(self._clock() + BUDGET_S / 2)
        if is_more or self._to_read or self._at_work:
            self._turn_soon()

    def _turn_soon(self) -> None:
        if not self._turn_is_due and self._loop is not None:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def _drain(self, watch: ZmqWatch, hear: Callable[[bytes], None], end_s: float) -> bool:
        """Read at least one message; return whether there may be more."""
        socket = watch.socket
        while not socket.closed:
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return False
            hear(frame)
            if self._clock() >= end_s:
                return True
        return False

    def _work(self, end_s: float) -> None:
        """Let the feeds hand on what waits: each a portion, then each another."""
        while self._at_work:
            link = next(iter(self._at_work))
            del self._at_work[link]
            try:
                link.feed.work()
            except Exception:
                self._distrust(link)
            if link.feed.has_work:
                self._at_work[link] = None  # behind the others
            if self._clock() >= end_s:
                return

    def _tick(self) -> None:
        assert self._loop is not None
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        now_s = self._clock()
        for link in list(self._links.values()):
            feed = link.feed
            if feed.state.is_behind:
                self._ask(link, feed.tick(now_s))
            if link.heard and now_s - feed.heard_s > SILENT_S:
                link.heard = False
                logger.warning("Nothing is heard of replica %s any more; it is routed to by what was.", feed.replica_id)
                self._sink.lost(feed.replica_id)

    # Messages

    def _hear_news(self, frame: bytes) -> None:
        self._hear(self._decode(frame, decode_news))

    def _hear_answer(self, frame: bytes) -> None:
        self._hear(self._decode(frame, decode_answer))

    def _hear(self, message: News | Answer | None) -> None:
        link = self._by_source.get(message.source) if message is not None else None
        if message is None or link is None:
            return  # forgotten, or of a replica that got the port of one that was
        try:
            ask = link.feed.hear(message, self._clock())
        except Exception:
            self._distrust(link)
            return
        if not link.heard:
            link.heard = True
            self._sink.connected(link.feed.replica_id)
        if ask:
            self._ask(link, ask)
        elif link.asker is not None and not link.feed.state.is_behind:
            self._close_asker(link)
        if link.feed.has_work:
            self._at_work[link] = None

    def _decode(self, frame: bytes, decode: Callable[[bytes], _Message]) -> _Message | None:
        try:
            return decode(frame)
        except OtherVersion as exc:
            self.counts.refused += 1
            if exc.version not in self._versions_told:
                self._versions_told.add(exc.version)
                logger.warning(
                    "A replica speaks version %d of the event plane, this gateway version %d: its messages are "
                    "ignored. Run the same release of raytrt on every node.",
                    exc.version,
                    PLANE_VERSION,
                )
        except msgspec.DecodeError as exc:
            self.counts.refused += 1
            logger.debug("A message of the event plane cannot be read: %s", exc)
        return None

    def _distrust(self, link: _Link) -> None:
        """Something made no sense, here or there: begin anew with this replica, and go on with the others."""
        logger.exception("What replica %s says cannot be taken in; asking it for all of it.", link.feed.replica_id)
        link.feed.start_anew()

    # Requests

    def _ask(self, link: _Link, request: int) -> None:
        """Send a request for a snapshot, if there is one; if it cannot be sent now, the feed will want another."""
        if not request or self._context is None:
            return
        self.counts.requests += 1
        try:
            if link.asker is None:
                link.asker = self._open_asker(link)
            message = SnapshotRequest(link.address.secret, request)
            link.asker.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            logger.debug("Replica %s cannot be asked: %s", link.feed.replica_id, exc)
        self._to_read[link] = None
        self._turn_soon()

    def _open_asker(self, link: _Link) -> ZmqWatch:
        assert self._context is not None
        socket = make_socket(self._context, zmq.DEALER)
        try:
            # The same name each time, so that a replica knows how often it is asked; and one a replica, because two may
            # be believed to be at one address, and who takes another's name takes over its connection.
            socket.setsockopt(zmq.ROUTING_ID, self._identity + source_of(link.feed.replica_id).to_bytes(8, "little"))
            socket.setsockopt(zmq.SNDHWM, 4)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_NEWS_BYTES)
            socket.connect(link.address.snapshots)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise

        def read() -> None:
            self._to_read[link] = None
            self._turn_soon()

        return ZmqWatch(socket, read)

    def _close_asker(self, link: _Link) -> None:
        self._to_read.pop(link, None)
        if link.asker is not None:
            link.asker.close()
            link.asker = None


def make_feeds(sink: EventSink) -> EventSubscriber:
    """Return what hears the replicas of one model for `sink`."""
    return EventSubscriber(sink)
