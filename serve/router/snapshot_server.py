"""SnapshotServer: answers gateways that miss something with all that is in the cache, in parts, a few at a time."""

import asyncio
import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import zmq

from serve.core.kv_content import PackedContent
from serve.router.binding import bind
from serve.router.wire import (
    MAX_REQUEST_BYTES,
    PLANE_VERSION,
    Hello,
    OtherVersion,
    SnapshotPart,
    decode_request,
    encode,
)
from serve.router.zmq_watch import ZmqWatch, make_socket

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.1  # between two snapshots for one gateway
PART_BLOCKS = 4096
_PARTS_A_TURN = 16  # a megabyte: a fraction of a millisecond of the replica's event loop
_MAX_TRANSFERS = 8
_MAX_QUEUED_PARTS = 32  # for one gateway: two megabytes
_RETRY_S = 0.005  # when a gateway's queue is full
_GIVE_UP_S = 5.0  # it has taken nothing for so long
_MAX_GATEWAYS = 4096


class Snapshot(NamedTuple):
    """A cache at one moment.

    Attributes:
        source, epoch, sequence: As in `SnapshotPart`.
        content: Its blocks.
    """

    source: int
    epoch: int
    sequence: int
    content: PackedContent


class _Transfer:
    """An answer on its way."""

    def __init__(self, frames: Iterator[bytes], now_s: float) -> None:
        self.frames = frames
        self.next = next(frames, None)
        self.progress_s = now_s


class SnapshotServer:
    """A ROUTER socket on the running event loop.

    Args:
        context: Of ZMQ.
        secret: What a request has to bring.
        hello: Makes the first message of an answer.
        snapshot: Makes the content of one.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        secret: str,
        hello: Callable[[], Hello],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._context = context
        self._secret = secret.encode()
        self._hello = hello
        self._snapshot = snapshot
        self._loop = asyncio.get_running_loop()
        self._watch: ZmqWatch | None = None
        self._waiting: OrderedDict[bytes, int] = OrderedDict()  # number of the last request, by gateway
        self._served_s: OrderedDict[bytes, float] = OrderedDict()  # the latest last
        self._transfers: dict[bytes, _Transfer] = {}
        self._timer: asyncio.Handle | None = None
        self._due_s = 0.0
        self._version_told: int | None = None
        self.endpoint = ""

    def start(self, host: str) -> None:
        """Bind to a free port of `host`.

        Raises:
            ConfigError: The address cannot be bound.
        """
        socket = make_socket(self._context, zmq.ROUTER)
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a gateway is gone, or takes no more now
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a gateway that comes back takes over from itself
            socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED_PARTS)
            socket.setsockopt(zmq.RCVHWM, 8)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
            self.endpoint = bind(socket, host)
        except BaseException:
            socket.close(linger=0)
            raise
        self._watch = ZmqWatch(socket, self._read)

    def close(self) -> None:
        """Stop answering."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._transfers.clear()

    # Requests

    def _read(self) -> None:
        """Take in all requests; of one gateway the last counts."""
        while self._watch is not None:
            try:
                frames = self._watch.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) == 2:
                self._take_request(*frames)
        self._serve()

    def _take_request(self, gateway: bytes, frame: bytes) -> None:
        try:
            request = decode_request(frame)
        except OtherVersion as exc:
            if exc.version != self._version_told:
                self._version_told = exc.version
                logger.warning(
                    "A gateway speaks version %d of the event plane, this replica version %d: its requests are "
                    "ignored. Run the same release of raytrt on every node.",
                    exc.version,
                    PLANE_VERSION,
                )
            return
        except msgspec.DecodeError:
            return
        if hmac.compare_digest(request.secret.encode(), self._secret) and len(self._waiting) < _MAX_GATEWAYS:
            self._waiting[gateway] = request.request

    # Answers

    def _serve(self) -> None:
        """Begin what may begin, and send a few parts of each answer that is on its way."""
        if self._watch is None:
            return
        now_s = self._loop.time()
        wait_s = self._begin(now_s)
        sent = self._send_some(now_s)
        if sent:
            self._serve_within(0.0)  # at least to look what has come meanwhile: ZMQ may not tell of it (see ZmqWatch)
        elif self._transfers:
            self._serve_within(_RETRY_S)
        elif self._waiting:
            self._serve_within(wait_s)

    def _begin(self, now_s: float) -> float:
        """Begin the answers that may begin; return how long to wait for the next one."""
        soonest_s = MIN_INTERVAL_S
        for gateway in list(self._waiting):
            if gateway in self._transfers:
                continue  # it has asked again before the answer was complete
            wait_s = self._served_s.get(gateway, -MIN_INTERVAL_S) + MIN_INTERVAL_S - now_s
            if wait_s > 0.0:
                soonest_s = min(soonest_s, wait_s)
            elif len(self._transfers) < _MAX_TRANSFERS:
                self._transfers[gateway] = _Transfer(self._answer(self._waiting.pop(gateway)), now_s)
                self._note_served(gateway, now_s)
        return soonest_s

    def _note_served(self, gateway: bytes, now_s: float) -> None:
        self._served_s[gateway] = now_s
        self._served_s.move_to_end(gateway)
        while now_s - next(iter(self._served_s.values())) > MIN_INTERVAL_S:
            self._served_s.popitem(last=False)

    def _send_some(self, now_s: float) -> int:
        """Send as much as is good for one turn of the event loop; return how many messages."""
        sent = 0
        for gateway, transfer in list(self._transfers.items()):
            room = max(1, _PARTS_A_TURN // len(self._transfers))
            while transfer.next is not None and room > 0 and self._send(gateway, transfer, now_s):
                transfer.progress_s = now_s
                transfer.next = next(transfer.frames, None)
                room -= 1
                sent += 1
            if transfer.next is None or now_s - transfer.progress_s > _GIVE_UP_S:
                self._transfers.pop(gateway, None)
        return sent

    def _send(self, gateway: bytes, transfer: _Transfer, now_s: float) -> bool:
        assert self._watch is not None
        assert transfer.next is not None
        try:
            self._watch.socket.send_multipart([gateway, transfer.next], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:  # it is gone
            logger.debug("A gateway did not wait for its snapshot: %s", exc)
            transfer.next = None
            return False
        return True

    def _answer(self, request: int) -> Iterator[bytes]:
        """Yield the messages of an answer; the content is that of now."""
        source, epoch, sequence, content = self._snapshot()
        hello = encode(self._hello())

        def frames() -> Iterator[bytes]:
            yield hello
            parts = max(1, -(-len(content) // PART_BLOCKS))
            for part in range(parts):
                here = slice(part * PART_BLOCKS, (part + 1) * PART_BLOCKS)
                words = slice(8 * here.start, 8 * here.stop)
                yield encode(
                    SnapshotPart(
                        source=source,
                        epoch=epoch,
                        request=request,
                        sequence=sequence,
                        part=part,
                        parts=parts,
                        hashes=content.hashes[words],
                        parents=content.parents[words],
                        tiers=content.tiers[here],
                    )
                )

        return frames()

    def _serve_within(self, delay_s: float) -> None:
        due_s = self._loop.time() + delay_s
        if self._timer is not None:
            if self._due_s <= due_s:
                return
            self._timer.cancel()
        self._due_s = due_s
        self._timer = self._loop.call_later(delay_s, self._fire) if delay_s > 0 else self._loop.call_soon(self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._read()
