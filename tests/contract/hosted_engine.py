"""A simulated engine in a process of its own, for the conformance suite: `HostedEngine` here, `main` there.

Beside the engine's socket there is one for the test, which asks what only the hosting process knows.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from serve.engines.remote.client import RemoteEngine
from serve.engines.remote.server import EngineServer
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.faults import Fault
from serve.engines.simulated.settings import SimulatedSettings


class HostedEngine(RemoteEngine):
    """Starts its process with `start`, and waits for its end with `stop`."""

    def __init__(
        self,
        settings: SimulatedSettings,
        on_beat: Callable[[], None] = lambda: None,
        on_death: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="raytrt-"))
        self._settings = settings
        self._secret_of_host = secrets.token_hex(16)
        self.process: asyncio.subprocess.Process | None = None
        super().__init__(self._directory / "engine", self._secret_of_host, on_beat=on_beat, on_death=on_death)

    async def start(self) -> None:
        await self.spawn()
        await super().start()

    async def spawn(self) -> None:
        """Start the process; it listens when this returns."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.hosted_engine", str(self._directory)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self._secret_of_host}\n{self._settings.model_dump_json()}\n".encode())
        assert await self.process.stdout.readline() == b"listening\n"

    async def stop(self) -> None:
        await super().stop()
        if self.process is not None:
            async with asyncio.timeout(30):
                await self.process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def ask(self, what: str) -> list[int]:
        """Ask the hosting process for something, and wait for it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.connect(str(self._directory / "control"))
            control.sendall(f"{what}\n".encode())
            answer: list[int] = json.loads(control.makefile().readline())
            return answer


async def host(directory: Path, secret: str, settings: SimulatedSettings) -> None:
    """Serve one engine until its replica has left."""
    engine = SimulatedEngine(settings)
    loop = asyncio.get_running_loop()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(str(directory / "control"))
    control.listen()
    threading.Thread(target=_answer, args=(control, engine, loop), daemon=True).start()
    server = EngineServer(engine, directory / "engine", secret)
    await server.listen()
    print("listening", flush=True)
    await server.run()


def _answer(control: socket.socket, engine: SimulatedEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def carry_out(what: str) -> list[int]:
        match what:
            case "content":
                return list(engine.cache_content())
            case "die":
                engine.inject(Fault(kind="die"))
            case "exit":
                engine.inject(Fault(kind="exit"))
        return []

    while True:
        connection, _ = control.accept()
        with connection, connection.makefile("rw") as lines:
            what = lines.readline().strip()
            lines.write(json.dumps(asyncio.run_coroutine_threadsafe(carry_out(what), loop).result()) + "\n")


def main() -> None:
    """Run in the process that hosts."""
    secret = sys.stdin.readline().strip()
    settings = SimulatedSettings.model_validate_json(sys.stdin.readline())
    asyncio.run(host(Path(sys.argv[1]), secret, settings))


if __name__ == "__main__":
    main()
