"""Membership: which replicas of a model run, what they said of themselves, and how large their KV blocks are."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from serve.core.routing.load import LoadReport
from serve.router.wire import PLANE_VERSION, OtherVersion, PlaneAddress

logger = logging.getLogger(__name__)

UNKNOWN_TOKENS_PER_BLOCK = 32  # where no replica says it; nothing is known of its cache then, so any size does


class Member(NamedTuple):
    """A replica.

    Attributes:
        address: Where it is heard; None: nowhere.
        tokens_per_block: Of its KV cache; 0 if it does not say.
        total_blocks: The same.
    """

    address: PlaneAddress | None
    tokens_per_block: int
    total_blocks: int

    @classmethod
    def from_metadata(cls, replica_id: str, metadata: Mapping[str, Any]) -> "Member":
        """Read what a replica said of itself when it started (`serve.router.wire.PlaneAddress.to_metadata`)."""
        try:
            address = PlaneAddress.from_metadata(metadata)
        except OtherVersion as exc:
            address = None
            reason = f"it speaks version {exc.version} of the event plane, this gateway {PLANE_VERSION}"
        else:
            reason = "it says no address"
        if address is None:
            logger.warning("Nothing is heard of replica %s: %s. It is routed to all the same.", replica_id, reason)
        return cls(address, _count(metadata, "tokens_per_block"), _count(metadata, "total_blocks"))


class Membership:
    """The replicas that can be chosen. During an upgrade they may disagree about the size of blocks."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._dead: set[str] = set()
        self._size = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __getitem__(self, replica_id: str) -> Member:
        return self._members[replica_id]

    @property
    def tokens_per_block(self) -> int:
        """The size that counts here: it changes only when no replica has it any more. 0: there never was a replica."""
        return self._size

    def update(self, replicas: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """Take in all replicas, with their metadata; return those that came, and those that went."""
        self._dead &= replicas.keys()
        added = [name for name in replicas if name not in self._members and name not in self._dead]
        removed = [name for name in self._members if name not in replicas]
        for name in removed:
            del self._members[name]
        for name in added:
            self._members[name] = Member.from_metadata(name, replicas[name])
        self._settle_size()
        return added, removed

    def bury(self, replica_id: str) -> bool:
        """Remove a replica that died, for good; False if there was none."""
        self._dead.add(replica_id)
        return self._members.pop(replica_id, None) is not None

    def size(self, replica_id: str) -> int:
        """Return how many tokens a replica's blocks have."""
        return self._members[replica_id].tokens_per_block or self._size

    def fits(self, replica_id: str) -> bool:
        """Whether a replica's blocks have the size that counts."""
        return self.size(replica_id) == self._size

    def _settle_size(self) -> None:
        sizes = Counter(member.tokens_per_block for member in self._members.values() if member.tokens_per_block)
        if sizes and self._size not in sizes:
            self._size = max(sizes, key=lambda size: (sizes[size], size))
        elif self._members and not self._size:
            self._size = UNKNOWN_TOKENS_PER_BLOCK


def rescaled(report: LoadReport, factor: float) -> LoadReport:
    """Return a report with its blocks counted in blocks of another size; `factor`: theirs over ours, in tokens."""
    return msgspec.structs.replace(
        report,
        used_blocks=round(report.used_blocks * factor),
        total_blocks=round(report.total_blocks * factor),
        committed_blocks=round(report.committed_blocks * factor),
    )


def _count(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name)
    return value if isinstance(value, int) and value > 0 else 0
