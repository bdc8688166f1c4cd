"""MpiLauncher: TensorRT-LLM spawns one process a rank through MPI, below this process, which owns the GPUs."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from serve.core.parallel import ParallelLayout
from serve.engines.protocol import Engine
from serve.engines.trtllm.orchestration import Orchestration, engine_environ
from serve.errors import ConfigError, EngineDead
from serve.workers.launchers.port import RankObserver, RankProcess
from serve.workers.launchers.rank_search import FoundProcess, group_of_this_process, kill, mpi_ranks, still_there
from serve.workers.mpi_probe import why_mpi_does_not_spawn

logger = logging.getLogger(__name__)

_SEARCH_S = 0.25  # between two looks for new ranks, while the engine starts
_LAST_SEARCH_S = 5.0  # ranks that are not found so long after the start are told
_KILL_LIMIT_S = 5.0
# Open MPI 5 ends this process with the last of its ranks (measured with 5.0.11: exit status 14, unless
# OMPI_MCA_mpi_ft_enable=1). Streams have been told by then that the engine is dead: let that leave first.
_LAST_WORDS_S = 0.25
_POLL_S = 0.02


class MpiLauncher:
    """Launcher port.

    The ranks are found by the group's mark while they load, so that one that dies then fails the start at once, and is
    not waited for until the start's time limit, as 1.2.x would. The group watches their processes.

    Args:
        make_engine: Makes the engine, which loads nothing yet.
        layout: How it is cut.
        node_id: Of this machine, as the group knows it.
        why_not: Tells why MPI cannot start processes here; None if it can. Blocks.
    """

    def __init__(
        self,
        make_engine: Callable[[Orchestration], Engine],
        layout: ParallelLayout,
        node_id: str = "",
        why_not: Callable[[], str | None] = why_mpi_does_not_spawn,
    ) -> None:
        self._make_engine = make_engine
        self._layout = layout
        self._node_id = node_id
        self._why_not = why_not
        self._found: dict[int, FoundProcess] = {}

    async def launch(self, observer: RankObserver) -> Engine:
        """Start the engine, and find its ranks meanwhile; see the port."""
        reason = await asyncio.to_thread(self._why_not)
        if reason is not None:
            raise ConfigError(
                f"orchestrator: mpi cannot start processes on this node: {reason}. Use orchestrator: ray, or an image "
                "whose MPI_Comm_spawn works"
            )
        group = group_of_this_process()
        environ = engine_environ("mpi", self._layout, os.environ)
        engine = self._make_engine(Orchestration("mpi", environ=environ))
        starting = asyncio.ensure_future(engine.start())
        try:
            while not starting.done():
                await asyncio.wait([starting], timeout=_SEARCH_S)
                await self._search(group, observer)
            await starting
            await self._search_the_rest(group, observer)
        except BaseException:
            starting.cancel()
            await engine.stop()
            raise
        return engine

    def ranks(self) -> Sequence[RankProcess]:
        """Return the ranks found so far."""
        return [self._rank_process(rank, found) for rank, found in sorted(self._found.items())]

    async def end(self, grace_s: float) -> None:
        """Wait for the ranks to end, as the engine was stopped; then kill them. See the port."""
        left = await self._wait_for_end(grace_s)
        if not left:
            return
        await asyncio.sleep(_LAST_WORDS_S)
        logger.warning("MPI ranks do not end by themselves: killing %s.", ", ".join(str(found.pid) for found in left))
        kill(left)
        left = await self._wait_for_end(_KILL_LIMIT_S)
        if left:
            raise TimeoutError(f"MPI ranks will not die: {', '.join(f'process {found.pid}' for found in left)}")

    async def _wait_for_end(self, limit_s: float) -> list[FoundProcess]:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while still_there(self._found.values()):  # noqa: ASYNC110  # nobody signals the end of a grandchild
                    await asyncio.sleep(_POLL_S)
        return still_there(self._found.values())

    async def _search(self, group: str, observer: RankObserver) -> None:
        for found in await asyncio.to_thread(mpi_ranks, group):
            rank = found.rank if found.rank is not None else len(self._found)
            if rank not in self._found and rank < self._layout.world_size:
                self._found[rank] = found
                observer.rank_started(self._rank_process(rank, found))

    async def _search_the_rest(self, group: str, observer: RankObserver) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SEARCH_S):
                while await self._incomplete(group, observer):  # noqa: ASYNC110
                    await asyncio.sleep(_SEARCH_S)
        missing = sorted(set(range(self._layout.world_size)) - set(self._found))
        gone = [rank for rank, found in self._found.items() if not still_there([found])]
        if gone:
            raise EngineDead(f"MPI ranks {gone} died while the engine started")
        if missing:
            logger.warning("The processes of MPI ranks %s were not found; only their tokens are watched.", missing)

    async def _incomplete(self, group: str, observer: RankObserver) -> bool:
        await self._search(group, observer)
        return len(self._found) < self._layout.world_size

    def _rank_process(self, rank: int, found: FoundProcess) -> RankProcess:
        return RankProcess(rank, self._node_id, found.pid, found.created_s)
