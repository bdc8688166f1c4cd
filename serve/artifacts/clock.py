"""Clock: time as the store sees it, so that tests can hand in their own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """Three ways of time.

    Attributes:
        now_s: Seconds since the epoch. Another machine's may differ by seconds, so that only what lasts hours is judged
            by it.
        monotonic_s: Seconds since whenever; never steps.
        sleep: Wait for that many seconds.
    """

    now_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def iso(self) -> str:
        """Return the time as ISO 8601, UTC."""
        return datetime.fromtimestamp(self.now_s(), UTC).isoformat(timespec="milliseconds")
