"""NodeScout: finds and watches the ranks of a group on a node other than the replica's."""

from dataclasses import dataclass

import ray

from serve.workers.launchers.rank_search import FoundProcess, is_running, kill, ray_ranks, still_there


@dataclass(frozen=True)
class Sighting:
    """A rank's process, as a scout saw it.

    Attributes:
        process: The process.
        running: False if it is stopped; None if it is gone.
    """

    process: FoundProcess
    running: bool | None


class NodeScout:
    """An actor without resources, pinned to one node. It dies with the replica that made it.

    Args:
        group: Whose ranks.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._known: dict[int, FoundProcess] = {}

    def look(self, search: bool) -> list[Sighting]:
        """Return every rank that was seen so far.

        Args:
            search: Look for new ones as well.
        """
        if search:
            for found in ray_ranks(self._group):
                self._known.setdefault(found.pid, found)
        return [Sighting(process, is_running(process)) for process in self._known.values()]

    def end(self, force: bool) -> list[int]:
        """Return the process ids of the ranks that are still there; with `force`, kill them."""
        if force:
            kill(list(self._known.values()))
        return [process.pid for process in still_there(self._known.values())]


ScoutActor = ray.remote(num_cpus=0, num_gpus=0, max_restarts=0)(NodeScout)
