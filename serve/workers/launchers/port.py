"""Launcher port: how the ranks of one engine come to life, and end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serve.engines.protocol import Engine


@dataclass(frozen=True)
class RankProcess:
    """The process of one rank.

    Attributes:
        rank: Its index in the group.
        node_id: Of its Ray node, hexadecimal.
        pid: On that node.
        created_s: When the process was created (`psutil.Process.create_time`), as process ids are used again.
        gpu_memory: GPU (index or UUID on that node) -> bytes that were in use before the rank loaded anything; empty if
            it has none, or if they are GPUs of the replica.
    """

    rank: int
    node_id: str
    pid: int
    created_s: float
    gpu_memory: Mapping[str, int] = field(default_factory=dict, compare=False)


class RankObserver(Protocol):
    """Who wants to know how the ranks are; called on the event loop that launched them."""

    def rank_started(self, process: RankProcess) -> None:
        """A rank has a process; it may still be loading."""

    def rank_beat(self, rank: int) -> None:
        """A rank showed that it is alive. Not every launcher's ranks do; those of others are watched from outside."""

    def rank_died(self, rank: int, reason: str) -> None:
        """A rank is gone, or cannot go on."""


class Launcher(Protocol):
    """Starts all ranks of one engine, once."""

    async def launch(self, observer: RankObserver) -> Engine:
        """Start every rank and the engine on them; return the engine when it can generate.

        The group's mark is in this process's environment (`serve.workers.processes`): children inherit it, and a
        launcher whose ranks are no children hands it on.

        Raises:
            ConfigError: The placement, the settings or the machine do not fit; nothing was taken, or all is given back.
            EngineDead: A rank was lost on the way.
        """

    def ranks(self) -> Sequence[RankProcess]:
        """Return the ranks that have a process of their own, as far as they are known."""

    async def end(self, grace_s: float) -> None:
        """End every rank: politely within `grace_s`, then by force. The group has stopped the engine before.

        Returns when nothing is left that this launcher could end, or raises `TimeoutError` naming processes that will
        not die. The group then kills, on every node of its ranks, what still carries its mark. Safe to call at any
        time, and twice.
        """
