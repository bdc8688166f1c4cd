"""A launcher whose ranks are processes that sleep, and whose engine is simulated."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil

from serve.engines.protocol import Engine
from serve.engines.simulated.engine import SimulatedEngine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings
from serve.workers.launchers.port import RankObserver, RankProcess

# Like a rank that starts processes of its own, one of them in a session of its own.
RANK_PROGRAM = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def slow_settings(**changes: object) -> SimulatedSettings:
    """An engine that takes 10 ms a token."""
    return SimulatedSettings.model_validate({"latency": FixedLatencySettings(decode_step_s=0.01)} | changes)


def start_rank() -> subprocess.Popen[bytes]:
    """Start a rank; it has its child when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", RANK_PROGRAM], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        output.readline()
    return process


class FakeLauncher:
    """Launcher port over sleeping processes.

    Args:
        engine: What it hands out.
        world_size: Ranks.
        error: Raised by `launch` after the ranks were started.
        hang: Whether `launch` comes to no end.
    """

    def __init__(
        self,
        engine: SimulatedEngine | None = None,
        *,
        world_size: int = 2,
        error: Exception | None = None,
        hang: bool = False,
    ) -> None:
        self.engine = engine or SimulatedEngine(slow_settings())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.graces_s: list[float] = []
        self.beats = True
        self._world_size = world_size
        self._error = error
        self._hang = hang
        self._pulse: asyncio.Task[None] | None = None

    async def launch(self, observer: RankObserver) -> Engine:
        """Start the processes, then the engine."""
        for rank in range(self._world_size):
            starting = asyncio.ensure_future(asyncio.to_thread(self._start_rank))
            try:
                process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                await starting  # nothing begins to live after the launch has come to its end
                raise
            observer.rank_started(RankProcess(rank, "", process.pid, psutil.Process(process.pid).create_time()))
        if self._hang:
            await asyncio.Event().wait()
        if self._error is not None:
            raise self._error
        await self.engine.start()
        return self.engine

    def ranks(self) -> Sequence[RankProcess]:
        """Return what has been started."""
        return [RankProcess(rank, "", process.pid, 0.0) for rank, process in enumerate(self.processes)]

    async def end(self, grace_s: float) -> None:
        """Forget to end anything but the first rank: the group has to see to the rest."""
        self.graces_s.append(grace_s)
        for process in self.processes[:1]:
            process.kill()
        await asyncio.to_thread(self._reap)

    def _start_rank(self) -> subprocess.Popen[bytes]:
        self.processes.append(start_rank())
        return self.processes[-1]

    def _reap(self) -> None:
        for process in self.processes[:1]:
            process.wait()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid, number)

    def collect(self) -> None:
        """Wait for the processes that the group killed, so that no zombie stays with the tests."""
        for process in self.processes:
            process.wait()
