"""Where the ranks of a tensor-parallel group meet: who each of them is, and the store that they find each other by."""

import socket
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it from C

_OPEN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class TensorRank:
    """One rank of a tensor-parallel group; rank 0 leads.

    Attributes:
        rank: Below `world_size`.
        world_size: Ranks of the group.
        store_host: Where rank 0 keeps the store (`open_store`), as every rank can reach it.
        store_port: Likewise.
        device_index: CUDA device of this process; None for its current one, or for the CPU.
        timeout_s: How long to wait for ranks that have not come to the meeting.
    """

    rank: int
    world_size: int
    store_host: str
    store_port: int
    device_index: int | None = None
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not below world_size={self.world_size}")

    @property
    def leads(self) -> bool:
        """Whether this is the rank that has the requests."""
        return self.rank == 0


def open_store(host: str) -> tuple[TCPStore, int]:
    """Open the store in the process of rank 0, which has to keep it until the group has ended.

    Args:
        host: A name or address of this machine that the other ranks reach it by.

    Returns:
        The store, and the port that it listens at.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_OPEN_TIMEOUT_S))
    return store, int(store.port)


def visit_store(rank: TensorRank) -> TCPStore:
    """Connect to the group's store, from any rank. What waits in it waits for `rank.timeout_s`."""
    timeout = timedelta(seconds=rank.timeout_s)
    return TCPStore(rank.store_host, rank.store_port, is_master=False, wait_for_workers=False, timeout=timeout)


def own_address(rank: TensorRank) -> str:
    """Return the address of this machine on its way to the store: the one that the other ranks reach."""
    # Connecting a datagram socket sends nothing; it only chooses the route.
    family, kind, protocol, _, address = socket.getaddrinfo(rank.store_host, rank.store_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
