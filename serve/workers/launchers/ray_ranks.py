"""RayRanks: the worker actors of a Ray-orchestrated engine, found on each node and watched there.

TensorRT-LLM watches none of them: a rank that dies shows as a collective that hangs. Ranks of the replica's own node
are watched by the group, which sees their processes; those of other nodes by a scout on each.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.workers.launchers.node_scout import NodeScout, ScoutActor, Sighting
from serve.workers.launchers.port import RankObserver, RankProcess
from serve.workers.launchers.rank_search import FoundProcess, group_of_this_process

logger = logging.getLogger(__name__)

_SEARCH_S = 0.5  # between two looks
_LAST_SEARCH_S = 5.0  # ranks that are not found so long after the start are told
_ANSWER_S = 2.0  # a scout that does not answer for so long sees nothing
_KILL_LIMIT_S = 5.0


class _LocalScout:
    """A scout that is no actor: for the replica's own node."""

    def __init__(self, group: str) -> None:
        self._scout = NodeScout(group)

    async def look(self, search: bool) -> list[Sighting]:
        return await asyncio.to_thread(self._scout.look, search)

    async def end(self, force: bool) -> list[int]:
        return await asyncio.to_thread(self._scout.end, force)

    def leave(self) -> None:
        """There is nothing to leave."""


class _RemoteScout:
    """A scout on another node."""

    def __init__(self, group: str, node: str) -> None:
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor: Any = ScoutActor.options(scheduling_strategy=pinned).remote(group)

    async def look(self, search: bool) -> list[Sighting]:
        sightings: list[Sighting] = await self._actor.look.remote(search)
        return sightings

    async def end(self, force: bool) -> list[int]:
        pids: list[int] = await self._actor.end.remote(force)
        return pids

    def leave(self) -> None:
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor)


@dataclass
class _Node:
    """One node of the group: the ranks that belong there, and those found."""

    node_id: str
    ranks: list[int]
    scout: _LocalScout | _RemoteScout
    found: dict[int, FoundProcess] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)


class RayRanks:
    """The ranks of one engine.

    Args:
        rank_nodes: Node of each rank.
        here: The replica's node.
        observer: Who wants to know of them.
    """

    def __init__(self, rank_nodes: Sequence[str], here: str, observer: RankObserver) -> None:
        group = group_of_this_process()
        self._here = here
        self._observer = observer
        self._nodes = [
            _Node(
                node,
                [rank for rank, of in enumerate(rank_nodes) if of == node],
                _LocalScout(group) if node == here else _RemoteScout(group, node),
            )
            for node in dict.fromkeys(rank_nodes)
        ]
        self._watching: asyncio.Task[None] | None = None

    def processes(self) -> list[RankProcess]:
        """Return the ranks found so far, in rank order."""
        found = [
            RankProcess(rank, node.node_id, process.pid, process.created_s)
            for node in self._nodes
            for rank, process in node.found.items()
        ]
        return sorted(found, key=lambda process: process.rank)

    async def find_while(self, starting: asyncio.Future[None]) -> None:
        """Look for ranks until `starting` is done."""
        while not starting.done():
            await asyncio.wait([starting], timeout=_SEARCH_S)
            await self._look_everywhere(search=True)

    async def watch(self) -> None:
        """Find the rest of the ranks, and watch all of them from now on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SEARCH_S):
                while self._missing():
                    await self._look_everywhere(search=True)
                    await asyncio.sleep(_SEARCH_S / 2)
        if self._missing():
            logger.warning("The processes of ranks %s were not found; only tokens are watched.", self._missing())
        self._watching = asyncio.create_task(self._watch())

    async def end(self, grace_s: float) -> None:
        """Wait for all ranks to end; then kill them.

        Raises:
            TimeoutError: Some will not die.
        """
        if self._watching is not None:
            self._watching.cancel()
        left = await self._wait_for_end(grace_s, force=False)
        if left:
            logger.warning("Ray workers do not end by themselves: killing %s.", ", ".join(left))
            left = await self._wait_for_end(_KILL_LIMIT_S, force=True)
        for node in self._nodes:
            node.scout.leave()
        if left:
            raise TimeoutError(f"Ray workers will not die: {', '.join(left)}")

    def _missing(self) -> list[int]:
        return [rank for node in self._nodes for rank in node.ranks if rank not in node.found]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_SEARCH_S)
            await self._look_everywhere(search=False)

    async def _look_everywhere(self, search: bool) -> None:
        await asyncio.gather(*(self._look(node, search) for node in self._nodes))

    async def _look(self, node: _Node, search: bool) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                sightings = await node.scout.look(search)
        except TimeoutError:
            return  # its ranks do not beat meanwhile, which the group notices
        except ray.exceptions.RayError as exc:
            for rank in node.ranks:
                self._lose(node, rank, f"node {node.node_id[:8]} is lost: {type(exc).__name__}")
            return
        for sighting in sightings:
            number = self._rank_of(node, sighting.process)
            if number is None:
                continue
            if sighting.running is None:
                self._lose(node, number, f"process {sighting.process.pid} on node {node.node_id[:8]} died")
            elif sighting.running and node.node_id != self._here and not search:
                self._observer.rank_beat(number)

    def _rank_of(self, node: _Node, process: FoundProcess) -> int | None:
        """Return a process's rank: workers of a node are created in rank order."""
        for rank, known in node.found.items():
            if known == process:
                return rank
        free = [rank for rank in node.ranks if rank not in node.found]
        if not free:
            return None
        node.found[free[0]] = process
        self._observer.rank_started(RankProcess(free[0], node.node_id, process.pid, process.created_s))
        return free[0]

    def _lose(self, node: _Node, rank: int, reason: str) -> None:
        if rank not in node.lost:
            node.lost.add(rank)
            self._observer.rank_died(rank, reason)

    async def _wait_for_end(self, limit_s: float, force: bool) -> list[str]:
        left: Mapping[str, list[int]] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while True:
                    left = {node.node_id: await self._left(node, force) for node in self._nodes}
                    if not any(left.values()):
                        break
                    await asyncio.sleep(0.05)
        return [f"process {pid} on node {node[:8]}" for node, pids in left.items() for pid in pids]

    async def _left(self, node: _Node, force: bool) -> list[int]:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await node.scout.end(force)
        except (TimeoutError, ray.exceptions.RayError):
            return []  # the node is lost, and its ranks with it; the group looks there once more
