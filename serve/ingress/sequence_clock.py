"""SequenceClock: when the tokens of one sequence came, for the metrics."""

import time

from serve.core.request import PrefillInfo
from serve.ingress.metrics import ModelMetrics
from serve.ingress.sequence import SequenceText


class SequenceClock:
    """Measures one sequence, from the request reaching the gateway to its last token."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_started_s")

    def __init__(self, metrics: ModelMetrics, started_s: float) -> None:
        """Begin to wait for the first token. `started_s`: `time.monotonic()` when the request arrived."""
        self._metrics = metrics
        self._started_s = started_s
        self._first_s = self._last_s = 0.0
        metrics.in_flight += 1
        metrics.waiting += 1

    def saw_prefill(self, prefill: PrefillInfo) -> None:
        """Record what the engine measured."""
        self._metrics.queue.observe(prefill.queue_s)
        self._metrics.prefill.observe(prefill.prefill_s)

    def saw_tokens(self, count: int) -> None:
        """Record that tokens have come, together."""
        if not count:
            return
        now_s = time.monotonic()
        if self._first_s:
            self._metrics.itl.observe((now_s - self._last_s) / count, count)
        else:
            self._first_s = now_s
            self._metrics.waiting -= 1
            self._metrics.ttft.observe(now_s - self._started_s)
        self._last_s = now_s

    def close(self, text: SequenceText) -> None:
        """Record the end, whatever it is."""
        metrics, tokens = self._metrics, text.completion_tokens
        metrics.in_flight -= 1
        metrics.waiting -= 0 if self._first_s else 1
        metrics.completion_tokens += tokens
        if text.finish_reason is None or not self._first_s:
            return
        metrics.e2e.observe(self._last_s - self._started_s)
        if tokens > 1:
            metrics.tpot.observe((self._last_s - self._first_s) / (tokens - 1))
