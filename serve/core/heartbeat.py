"""Heartbeats: which ranks are on time, late, or lost. Pure: time is passed in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Lateness:
    """What a look at the ranks showed.

    Attributes:
        late: Rank -> how long it has been silent, if that is longer than `suspect_s`.
        lost: The same, longer than `limit_s`.
    """

    late: Mapping[int, float] = field(default_factory=dict)
    lost: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Heartbeats:
    """When each rank was last heard.

    A process that was held up itself (a stopped machine, a long garbage collection) has not listened meanwhile: the
    time by which a look comes too late is nobody's silence.

    Attributes:
        suspect_s, limit_s: Silence after which a rank is late, and lost.
        look_s: Time between two looks.
        heard_s: Rank -> time of its last beat.
        looked_s: Time of the last look; None before the first.
    """

    suspect_s: float
    limit_s: float
    look_s: float
    heard_s: Mapping[int, float] = field(default_factory=dict)
    looked_s: float | None = None

    def beat(self, rank: int, now_s: float) -> "Heartbeats":
        """Return what is known after a beat; a rank that is never heard is not watched."""
        return replace(self, heard_s={**self.heard_s, rank: now_s})

    def look(self, now_s: float) -> tuple["Heartbeats", Lateness]:
        """Return what is known after a look, and who is not on time."""
        deaf_s = 0.0 if self.looked_s is None else max(0.0, now_s - self.looked_s - 2 * self.look_s)
        heard_s = self.heard_s
        if deaf_s:
            heard_s = {rank: min(now_s, heard + deaf_s) for rank, heard in heard_s.items()}
        silent_s = {rank: now_s - heard for rank, heard in heard_s.items()}
        late = {rank: silent for rank, silent in silent_s.items() if silent > self.suspect_s}
        lost = {rank: silent for rank, silent in late.items() if silent > self.limit_s}
        return replace(self, heard_s=heard_s, looked_s=now_s), Lateness(late, lost)
