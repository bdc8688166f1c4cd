"""Pollers: the one thread that reads KV events and statistics, and the one that asks for health.

Both queues of the library are emptied by reading, so that each must have one reader; and each read blocks for its
timeout. Health is asked by another thread: an answer that does not come must not stop the events.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)

READ_TIMEOUT_S = 0.005  # each read lasts at least so long; longer would only delay the other queue
HEALTH_S = 1.0
_MAX_PAUSE_S = 5.0
Records = Sequence[Mapping[str, Any]]


class QueuePoller:
    """Reads both queues, in one thread, until it is stopped.

    Args:
        llm: The library's object.
        on_events: Gets KV events, in order; called in the thread. None: they are off.
        on_records: Gets statistics of steps, in order; called in the thread.
        events_interval_s, stats_interval_s: How often each is read.
    """

    def __init__(
        self,
        llm: Any,
        on_events: Callable[[Records], None] | None,
        on_records: Callable[[Records], None],
        events_interval_s: float,
        stats_interval_s: float,
    ) -> None:
        self._duties = [_Duty("statistics", llm.get_stats, on_records, stats_interval_s)]
        if on_events is not None:
            self._duties.insert(0, _Duty("KV events", llm.get_kv_cache_events, on_events, events_interval_s))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trtllm-poller", daemon=True)

    def start(self) -> None:
        """Begin. Only after the first request: 1.2.x raises before."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; does not wait for a read that blocks."""
        self._stopped.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; return whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            now_s = time.monotonic()
            for duty in self._duties:
                if duty.due_s <= now_s:
                    duty.perform()
            self._stopped.wait(max(0.0, min(duty.due_s for duty in self._duties) - time.monotonic()))


class _Duty:
    """One queue."""

    def __init__(self, what: str, read: Callable[..., Any], give: Callable[[Records], None], interval_s: float) -> None:
        self._what = what
        self._read = read
        self._give = give
        self._interval_s = interval_s
        self._failures = 0
        self.due_s = 0.0

    def perform(self) -> None:
        """Read once, and hand on what was read."""
        try:
            records = [_parsed(record) for record in self._read(timeout=READ_TIMEOUT_S) or ()]
            if records:
                self._give(records)
            self._failures = 0
        except Exception as exc:  # whether the engine is dead, others decide
            self._failures += 1
            if self._failures == 1:
                _log.warning("Reading %s failed: %s: %s", self._what, type(exc).__name__, exc)
        self.due_s = time.monotonic() + min(_MAX_PAUSE_S, self._interval_s * 2**self._failures)


class HealthPoller:
    """Asks the library whether it is well, in a thread, until it is stopped or the answer is no.

    In 1.2.x that says nothing of a killed worker: the watchdog of the worker group does (`serve.core.watchdog`).

    Args:
        llm: The library's object.
        on_sick: Gets the reason; called in the thread, once.
        interval_s: How often.
    """

    def __init__(self, llm: Any, on_sick: Callable[[str], None], interval_s: float = HEALTH_S) -> None:
        self._llm = llm
        self._on_sick = on_sick
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trtllm-health", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; does not wait for an answer that does not come."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            reason = self._sickness()
            if reason is not None and not self._stopped.is_set():
                self._on_sick(reason)
                return

    def _sickness(self) -> str | None:
        try:
            return None if self._llm._check_health() else "TensorRT-LLM says that it is not healthy"
        except Exception as exc:
            return f"TensorRT-LLM's health check failed: {type(exc).__name__}: {exc}"


def _parsed(record: Any) -> Mapping[str, Any]:
    parsed = json.loads(record) if isinstance(record, str | bytes) else record
    if not isinstance(parsed, Mapping):
        raise TypeError(f"a record of type {type(parsed).__name__}")
    return parsed
