"""ZmqWatch: a ZMQ socket on an event loop, without a thread."""

import asyncio
from collections.abc import Callable

import zmq


class ZmqWatch:
    """Calls back when a socket may have something to read.

    ZMQ's file descriptor tells edges, not levels: it is readable when something has changed since the socket was last
    used, by any call. So whoever is called back has to read until there is nothing more, or to come back by itself;
    and has to look again after it has sent something on the same socket.

    Args:
        socket: Owned from now on.
        on_ready: Called on the running loop, soon for the first time.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", on_ready: Callable[[], None]) -> None:
        self.socket = socket
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, on_ready)
        self._loop.call_soon(on_ready)

    def close(self) -> None:
        """Stop watching, and close the socket without waiting for what it has not sent."""
        if not self.socket.closed:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            self.socket.close(linger=0)


def make_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    """Return a socket that notices within seconds that its peer is gone, and comes back soon after it."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    return socket
