"""EngineServer: an engine for a replica in another process of this node.

It serves one replica, once: when that leaves, the engine is stopped.
"""

import asyncio
import logging
import secrets
import stat
from pathlib import Path

from serve.core.framing import MAX_FRAME_BYTES
from serve.core.request import WIRE_VERSION
from serve.engines.protocol import Engine
from serve.engines.remote.link import FrameLink
from serve.engines.remote.session import ReplicaSession, stop_within
from serve.engines.remote.wire import (
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    Failed,
    Hello,
    Report,
    decode_hello,
    error_to_wire,
    pack,
    release,
)
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
MAX_PATH_BYTES = 107  # sun_path of unix(7), without its zero


class EngineServer:
    """One engine behind one socket.

    Args:
        engine: Not started; the replica starts it.
        path: Of the socket, in a directory that only this user can enter.
        secret: What the replica has to know.
        connect_timeout_s: How long the replica may take to come.
        stop_timeout_s: How long the engine may take to stop.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path,
        secret: str,
        *,
        connect_timeout_s: float = 60.0,
        stop_timeout_s: float = 30.0,
    ) -> None:
        self._engine = engine
        self._path = path
        self._secret = secret
        self._connect_timeout_s = connect_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._listener: asyncio.Server | None = None
        self._session: ReplicaSession | None = None
        self._arrived = asyncio.Event()

    async def listen(self) -> None:
        """Make the socket.

        Raises:
            ConfigError: The path is too long, or others may enter its directory.
        """
        if len(str(self._path).encode()) > MAX_PATH_BYTES:
            raise ConfigError(
                f"the engine's socket {self._path} is longer than {MAX_PATH_BYTES} bytes; use a shorter temporary "
                "directory (TMPDIR, or `ray start --temp-dir`)"
            )
        mode = self._path.parent.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(f"{self._path.parent}: others may enter it (mode {stat.filemode(mode)}); use mode 0700")
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: _Greeter(self).link, str(self._path))

    async def run(self) -> None:
        """Serve the replica until it leaves, or asks to stop; the engine is stopped when this returns."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._arrived.wait()
        except TimeoutError:
            logger.error("No replica came for the engine within %.0f s.", self._connect_timeout_s)
        finally:
            self._stop_listening()
        if self._session is None:
            await stop_within(self._engine, self._stop_timeout_s)
        else:
            await self._session.run(self._stop_timeout_s)

    def greet(self, hello: Hello, link: FrameLink) -> ReplicaSession:
        """Let a peer in.

        Raises:
            ValueError: It is not our replica, or there is one already.
        """
        if not secrets.compare_digest(hello.secret.encode(), self._secret.encode()):
            raise ValueError("wrong secret")
        if self._session is not None:
            raise ValueError("this engine has its replica already")
        if (hello.protocol, hello.wire) != (PROTOCOL_VERSION, WIRE_VERSION):
            error = ConfigError(
                f"the replica runs raytrt {hello.release} (protocol {hello.protocol}, wire {hello.wire}), its engine's "
                f"environment has raytrt {release()} (protocol {PROTOCOL_VERSION}, wire {WIRE_VERSION}): install the "
                "same release in both"
            )
            link.write(pack(Report(answer=Failed(error_to_wire(error)))))
            link.close()
            self._arrived.set()  # and it will not come back
            raise error
        self._session = ReplicaSession(self._engine, link)
        self._arrived.set()
        return self._session

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._path.unlink(missing_ok=True)


class _Greeter:
    """A peer that has to say hello, soon and briefly, before anything is believed or kept for it."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._session: ReplicaSession | None = None
        self._is_refused = False
        self.link = FrameLink(self._receive, self._compose, self._lost, MAX_HELLO_BYTES)
        self._timeout = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.link.abort, "no hello")

    def _receive(self, body: bytes) -> None:
        if self._session is not None:
            self._session.receive(body)
            return
        if self._is_refused:
            return
        try:
            self._session = self._server.greet(decode_hello(body), self.link)
            self.link.accept_frames_of(MAX_FRAME_BYTES)
            self._timeout.cancel()
        except ConfigError as exc:  # which the peer has been told
            logger.error("%s", exc)
            self._is_refused = True

    def _compose(self) -> bytes | None:
        return self._session.compose() if self._session is not None else None

    def _lost(self, reason: str) -> None:
        self._timeout.cancel()
        if self._session is not None:
            self._session.lost(reason)
        elif not self._is_refused:
            logger.warning("Turned a stranger away from the engine's socket: %s", reason)
