"""EngineFeed: what the engine's queues tell, as KV events and load."""

import logging
import time

from serve.core.kv_events import KvLedger
from serve.engines.protocol import EngineStats
from serve.engines.trtllm.loaded import Loaded
from serve.engines.trtllm.pollers import QueuePoller, Records
from serve.engines.trtllm.settings import TrtllmSettings
from serve.engines.trtllm.stats import FRESH_S, IterationRecord, OwnCounts, StepTotals, engine_stats, read_record

_log = logging.getLogger(__name__)


class EngineFeed:
    """Follows the engine's KV events and statistics. Its thread writes what the event loop reads.

    Args:
        loaded: The engine; it has generated already.
        settings: How often to read.
        ledger: Gets the KV events.
    """

    def __init__(self, loaded: Loaded, settings: TrtllmSettings, ledger: KvLedger) -> None:
        self._translator = loaded.translator
        self._ledger = ledger
        self._total_blocks = loaded.info.total_blocks
        self.max_batch_size = loaded.limits.max_batch_size
        self._last: tuple[float, IterationRecord] | None = None
        self._totals = StepTotals()
        self._counts_told = (0, 0)
        cache = settings.kv_cache
        has_events = bool(cache.event_buffer and cache.block_reuse)
        self._poller = QueuePoller(
            loaded.llm,
            self._take_events if has_events else None,
            self._take_records,
            cache.event_interval_s,
            settings.stats.interval_s,
        )

    def start(self) -> None:
        """Begin to read."""
        self._poller.start()

    def stop(self) -> None:
        """End soon."""
        self._poller.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of reading; return whether it came."""
        return self._poller.join(timeout_s)

    def record(self) -> IterationRecord | None:
        """Return the last step that was told of, if that was just now."""
        last = self._last
        return last[1] if last is not None and time.monotonic() - last[0] < FRESH_S else None

    def stats(self, own: OwnCounts) -> EngineStats:
        """Return the load."""
        return engine_stats(
            own,
            self.record(),
            self._totals,
            max_batch_size=self.max_batch_size,
            total_blocks=self._total_blocks,
            reusable_blocks=self._ledger.count(),
        )

    def _take_events(self, events: Records) -> None:
        translation = self._translator.translate(events)
        if translation.is_afresh:
            self._ledger.record_afresh(translation.events)
        else:
            self._ledger.record(translation.events)
        counts = self._translator.counts
        told = (counts.gaps, counts.malformed)
        if told != self._counts_told:
            self._counts_told = told
            _log.warning(
                "KV events are missing (%d gaps, %d events) or cannot be read (%d): routers learn the content of this "
                "cache anew. Raise engine.kv_cache.event_buffer if it happens often.",
                counts.gaps,
                counts.lost,
                counts.malformed,
            )

    def _take_records(self, records: Records) -> None:
        self._last = (time.monotonic(), read_record(records[-1]))
        self._totals = self._totals.add(records)
