"""What may happen to messages on their way: they are lost, come twice, late or in another order, or are cut off."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from functools import partial

import zmq

from serve.router.binding import bind
from serve.router.wire import PlaneAddress
from serve.router.zmq_watch import ZmqWatch, make_socket

HOST = "127.0.0.1"


class LossyRelay:
    """Stands between one replica's event plane and all gateways; its own address stays when the replica is replaced.

    Args:
        rng: What happens, and when.
        chaos: Share of the messages that something happens to.
    """

    def __init__(self, rng: random.Random, chaos: float) -> None:
        self.chaos = chaos
        self.harmed = 0
        self._rng = rng
        self._held: list[bytes] = []
        self._target: PlaneAddress | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._out = make_socket(self._context, zmq.PUB)
        self._events = bind(self._out, HOST)
        source = make_socket(self._context, zmq.SUB)
        source.setsockopt(zmq.SUBSCRIBE, b"")
        self._in = ZmqWatch(source, self._read)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen for requests for snapshots."""
        self._server = await asyncio.start_server(self._connected, HOST, 0)

    def aim(self, target: PlaneAddress) -> None:
        """Relay a replica from now on, and none that was before."""
        if self._target is not None:
            self._in.socket.disconnect(self._target.events)
        self._target = target
        self._in.socket.connect(target.events)
        self.cut()

    @property
    def address(self) -> PlaneAddress:
        """What gateways believe to be the replica's."""
        assert self._target is not None
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        target = self._target
        return PlaneAddress(self._events, f"tcp://{HOST}:{port}", target.secret, target.epoch, target.facts)

    def cut(self) -> None:
        """Break the connections on which snapshots are asked for and sent, whatever is on them."""
        for writer in self._connections:
            writer.transport.abort()

    def calm(self) -> None:
        """Be a good network from now on; what was held back still comes, in some order."""
        self.chaos = 0.0
        self._rng.shuffle(self._held)
        for frame in self._held:
            self._out.send(frame)
        self._held.clear()

    async def close(self) -> None:
        """Close everything."""
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        self._in.close()
        self._out.close(linger=0)
        self._context.term()

    def _read(self) -> None:
        with contextlib.suppress(zmq.Again):
            while not self._in.socket.closed:
                self._pass_on(self._in.socket.recv(zmq.NOBLOCK))

    def _pass_on(self, frame: bytes) -> None:
        rng, fate = self._rng, "pass"
        if rng.random() < self.chaos:
            self.harmed += 1
            fate = rng.choice(["lose", "repeat", "hold"])
        if fate == "hold":
            self._held.append(frame)
        elif fate != "lose":
            self._out.send(frame)
        if fate == "repeat":
            self._held.append(frame)
        while self._held and rng.random() < 0.4:
            self._out.send(self._held.pop(rng.randrange(len(self._held))))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._target is not None
        host, _, port = self._target.snapshots.removeprefix("tcp://").rpartition(":")
        try:
            source, sink = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, sink}
        self._connections |= ends
        try:
            await _first_of(partial(_pump, reader, sink), partial(_pump, source, writer))
        finally:
            self._connections -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


async def _first_of(*jobs: Callable[[], Awaitable[None]]) -> None:
    tasks = [asyncio.ensure_future(job()) for job in jobs]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
