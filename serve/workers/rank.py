"""Rank: the actor that is one rank of an engine. Rank 0 hosts the engine for the replica, the others follow.

Of ours nothing is imported here but `serve.core`, `serve.engines`, `serve.errors`, `serve.logs` and modules of this
package that need nothing else: ranks may live in a Python environment without Ray Serve.
"""

import asyncio
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from serve.engines.remote.server import EngineServer
from serve.logs import configure_logging
from serve.workers.gpu_memory import used_gpu_memory
from serve.workers.launchers.port import RankProcess
from serve.workers.processes import GROUP_VARIABLE, GroupMark, start_reaper
from serve.workers.rank_program import RankPlace, RankProgram, device_index


@dataclass(frozen=True)
class RankOrder:
    """What an actor is to be.

    Attributes:
        rank, world_size: Its place.
        program: What it runs.
        lease_s: It ends with all it started if nobody asked it for a beat for so long.
    """

    rank: int
    world_size: int
    program: RankProgram
    lease_s: float


class Rank:
    """One rank. Its methods run on the actor's event loop, which answers `beat` as long as the process goes on.

    Args:
        order: What to be.
    """

    def __init__(self, order: RankOrder) -> None:
        configure_logging()
        self._order = order
        mark = GroupMark.from_text(os.environ[GROUP_VARIABLE])
        self._reaper = start_reaper(mark, order.lease_s)
        self._place = RankPlace(order.rank, order.world_size, device_index=_own_device())
        self._meeting: Any = None
        self._server: EngineServer | None = None
        self._advanced_s: float | None = None  # when the program last said that it goes on

    async def describe(self) -> RankProcess:
        """Return the process, and what of its GPU's memory was in use before it."""
        process = psutil.Process()
        used = await asyncio.to_thread(used_gpu_memory) if _gpu_ids() else {}
        memory = {gpu: used[gpu] for gpu in _gpu_ids() if gpu in used}
        node_id = ray.get_runtime_context().get_node_id()
        return RankProcess(self._order.rank, node_id, process.pid, process.create_time(), memory)

    async def open_meeting(self) -> tuple[str, int] | None:
        """Open the place where the ranks find each other; rank 0 only."""
        address, self._meeting = await asyncio.to_thread(
            self._order.program.open_meeting, ray.util.get_node_ip_address()
        )
        return address

    async def listen(self, meeting: tuple[str, int] | None, path: Path, secret: str) -> None:
        """Make the engine, which loads nothing yet, and listen for the replica; rank 0 only."""
        engine = self._order.program.make_engine(replace(self._place, meeting=meeting))
        self._server = EngineServer(engine, path, secret)
        await self._server.listen()

    async def serve(self) -> None:
        """Serve the replica until it leaves; rank 0 only."""
        assert self._server is not None, "listen() comes first"
        await self._server.run()

    async def follow(self, meeting: tuple[str, int] | None) -> None:
        """Run the program of a rank other than 0, to its end."""
        place = replace(self._place, meeting=meeting)
        await asyncio.to_thread(self._order.program.follow, place, self._advance)

    async def beat(self) -> float | None:
        """Show that the process goes on; returns for how long its program has not advanced, if it tells."""
        if self._reaper is not None:
            self._reaper.renew()
        return time.monotonic() - self._advanced_s if self._advanced_s is not None else None

    async def leave(self) -> None:
        """End the program, if it can be told."""
        self._place.leave.set()

    def _advance(self) -> None:
        self._advanced_s = time.monotonic()


def _gpu_ids() -> list[str]:
    ids: dict[str, list[Any]] = ray.get_runtime_context().get_accelerator_ids()
    return [str(gpu) for gpu in ids.get("GPU", [])]


def _own_device() -> int | None:
    # Read before anything asks CUDA. NOSET keeps Ray from hiding the other GPUs, so that the index is the node's.
    return device_index(_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
