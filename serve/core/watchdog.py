"""Token watchdog: whether an engine makes progress, from what it is asked for and how fast it was. Pure.

Requests wait, and no token comes: for how long can that be right? An engine computes the prompt that comes to its end
next, and shares of others with it, before it generates a token; what is queued behind them has no part in it. So the
deadline follows from their length and from the speed at which earlier prompts were computed:

    tokens   = min(all prompts not computed, the longest of them + batch tokens)
    deadline = max(floor, min(limit, slack x (tokens / prompt tokens per second + 4 steps)))
"""

from dataclasses import dataclass, replace
from enum import Enum

_SAME_STEP_S = 0.002  # prompts that end within it were computed together, and are one measurement
_FORGET = 0.8  # what is left of older measurements after each new one


class Progress(Enum):
    """Verdict of one look."""

    IDLE = "idle"
    GOING = "going"
    SLOW = "slow"  # half of the deadline is over
    STALLED = "stalled"


@dataclass(frozen=True)
class TokenLimits:
    """When no token is too long.

    Attributes:
        floor_s: No deadline is shorter.
        first_floor_s: Nor this one before the first token ever: kernels are compiled, graphs captured.
        slack: How many times slower than before is still no stall.
        prefill_tokens_per_s: Assumed until a prompt was measured.
        max_s: No prompt moves a deadline beyond this; the floors may be higher.
        batch_tokens: Prompt tokens of others that may be computed along with the longest prompt.
        look_s: Time between two looks; what a look is late by is not the engine's silence.
    """

    floor_s: float
    first_floor_s: float
    slack: float
    prefill_tokens_per_s: float
    max_s: float
    batch_tokens: int
    look_s: float


@dataclass(frozen=True)
class TokenWatch:
    """What the watchdog remembers.

    Attributes:
        limits: Its settings.
        deltas: Deltas that had come at the last look.
        since_s: Since when there is no progress; None while nothing is asked for.
        looked_s: Time of the last look.
        measured_tokens, measured_s: Prompts computed so far and the time they took, older ones forgotten by and by.
    """

    limits: TokenLimits
    deltas: int = 0
    since_s: float | None = None
    looked_s: float | None = None
    measured_tokens: float = 0.0
    measured_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Speed at which prompts are computed."""
        if self.measured_s <= 0.0:
            return self.limits.prefill_tokens_per_s
        return max(1e-3, self.measured_tokens / self.measured_s)

    def prefilled(self, tokens: int, seconds: float) -> "TokenWatch":
        """Return what is known after a prompt.

        Args:
            tokens: So many were computed, not found in the cache.
            seconds: Since the prompt before it was done, or since there was one to compute.
        """
        if tokens <= 0 or seconds <= 0.0:
            return self
        kept = _FORGET if seconds > _SAME_STEP_S else 1.0
        return replace(
            self,
            measured_tokens=self.measured_tokens * kept + tokens,
            measured_s=self.measured_s * kept + seconds,
        )

    def deadline_s(self, pending_tokens: int, longest_tokens: int, step_s: float) -> float:
        """Return after how long a silence is a stall.

        Args:
            pending_tokens: Prompt tokens of requests that have no token yet.
            longest_tokens: Those of the longest.
            step_s: Duration of the engine's last step.
        """
        floor_s = self.limits.floor_s if self.deltas else max(self.limits.floor_s, self.limits.first_floor_s)
        tokens = min(pending_tokens, longest_tokens + self.limits.batch_tokens)
        needed_s = tokens / self.prefill_tokens_per_s + 4 * step_s
        return max(floor_s, min(self.limits.max_s, self.limits.slack * needed_s))

    def look(
        self, now_s: float, *, deltas: int, waiting: int, pending_tokens: int, longest_tokens: int, step_s: float
    ) -> tuple["TokenWatch", Progress]:
        """Return what is known after a look, and whether the engine makes progress.

        Args:
            now_s: The present.
            deltas: Deltas that have come since the start.
            waiting: Streams that wait for their next delta; a reader that takes its time is not the engine's silence.
            pending_tokens: Prompt tokens of requests that have no token yet.
            longest_tokens: Those of the longest.
            step_s: Duration of the engine's last step.
        """
        deaf_s = 0.0 if self.looked_s is None else max(0.0, now_s - self.looked_s - 2 * self.limits.look_s)
        if not waiting:
            return replace(self, deltas=deltas, since_s=None, looked_s=now_s), Progress.IDLE
        if deltas != self.deltas or self.since_s is None:
            return replace(self, deltas=deltas, since_s=now_s, looked_s=now_s), Progress.GOING
        since_s = min(now_s, self.since_s + deaf_s)
        after = replace(self, since_s=since_s, looked_s=now_s)
        silent_s, deadline_s = now_s - since_s, self.deadline_s(pending_tokens, longest_tokens, step_s)
        if silent_s > deadline_s:
            return after, Progress.STALLED
        return after, Progress.SLOW if silent_s > deadline_s / 2 else Progress.GOING
