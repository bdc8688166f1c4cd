"""LeaderLink: a follower's side of the control channel of a tensor-parallel group; see `followers.py`."""

import select
import socket
import threading
from collections import deque
from collections.abc import Callable

import msgspec
from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]  # torch exports it from C

from serve.core.framing import FrameReader, frame
from serve.engines.transformers.followers import MEETING_KEY
from serve.engines.transformers.messages import Answer, Joined, Order
from serve.engines.transformers.rendezvous import TensorRank
from serve.errors import EngineDead

_BEAT_S = 0.25  # between two beats while there is nothing to do
_FAREWELL_S = 1.0  # how long what the leader has sent last may take to be read, once it has hung up
_ORDERS = msgspec.msgpack.Decoder(Order)
_ENCODER = msgspec.msgpack.Encoder()


class LeaderLink:
    """The leader, as a follower sees it. For one thread.

    Args:
        link: Connected to the leader.
        on_beat: Called at least every quarter of a second while this waits, and for every order.
    """

    def __init__(self, link: socket.socket, on_beat: Callable[[], None]) -> None:
        self._link = link
        self._on_beat = on_beat
        self._reader = FrameReader()
        self._orders: deque[Order] = deque()
        self._ended = threading.Event()

    def next_order(self) -> Order:
        """Wait for the leader's next order, for as long as there is a leader.

        Raises:
            EngineDead: The leader is gone.
        """
        while not self._orders:
            self._on_beat()
            if select.select([self._link], [], [], _BEAT_S)[0]:
                self._receive()
        return self._orders.popleft()

    def answer(self, answer: Answer) -> None:
        """Tell the leader.

        Raises:
            EngineDead: The leader is gone.
        """
        try:
            self._link.sendall(frame(_ENCODER.encode(answer)))
        except OSError as exc:
            raise EngineDead(f"the leader of the tensor-parallel group is gone: {exc}") from exc

    def watch(self, on_hang_up: Callable[[], None]) -> None:
        """Call `on_hang_up`, on a thread of its own, if the leader goes while this rank computes."""

        def wait() -> None:
            poll = select.poll()
            poll.register(self._link, select.POLLRDHUP)
            poll.poll()
            if not self._ended.wait(_FAREWELL_S):
                on_hang_up()

        threading.Thread(target=wait, name="tensor-leader", daemon=True).start()

    def close(self) -> None:
        """Hang up. Safe to call twice."""
        self._ended.set()
        try:
            self._link.shutdown(socket.SHUT_RDWR)  # which also wakes the thread that watches
        except OSError:
            return
        finally:
            self._link.close()

    def _receive(self) -> None:
        try:
            data = self._link.recv(1 << 16)
        except OSError as exc:
            raise EngineDead(f"the leader of the tensor-parallel group is gone: {exc}") from exc
        if not data:
            raise EngineDead("the leader of the tensor-parallel group is gone")
        self._orders.extend(_ORDERS.decode(body) for body in self._reader.feed(data))


def follow(rank: TensorRank, store: TCPStore, software: str, on_beat: Callable[[], None]) -> LeaderLink:
    """Find the leader by the store, and join.

    Raises:
        EngineDead: There is no leader within `rank.timeout_s`.
    """
    try:
        host, port, token = store.get(MEETING_KEY).decode().split()
        link = socket.create_connection((host, int(port)), timeout=rank.timeout_s)
    except (DistStoreError, OSError) as exc:
        raise EngineDead(f"tensor rank {rank.rank} found no leader within {rank.timeout_s:.0f} s: {exc}") from exc
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    leader = LeaderLink(link, on_beat)
    leader.answer(Joined(token, rank.rank, software))
    return leader
