"""OutputReader: a growing output of TensorRT-LLM -> deltas, each token once.

The library yields the same object for every response and changes it in place: what is new is what lies beyond the
tokens that were read before. A stop word is cut off again with the last response; an end id may or may not be there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from serve.core.request import FinishReason, PrefillInfo, SamplingParams, TokenDelta, TokenLogprob
from serve.errors import StreamLost

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
    "timeout": FinishReason.CANCELLED,
    "not_finished": FinishReason.LENGTH,  # a prefill without a decode: all that was asked for
}


class OutputReader:
    """Reads the output of one request.

    Args:
        params: What was asked for.
        end_id: The stop token that the engine knows as the end of a sequence.
        submitted_s: When the engine got the request.
    """

    def __init__(self, params: SamplingParams, end_id: int, submitted_s: float) -> None:
        self._params = params
        self._end_id = end_id
        self._submitted_s = submitted_s
        self._read = 0
        self._last_token: int | None = None
        self._has_begun = False

    @property
    def generated(self) -> int:
        """Tokens read so far."""
        return self._read

    def read(
        self,
        output: Any,
        now_s: float,
        *,
        cached_tokens: int = 0,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> TokenDelta | None:
        """Return what a response added; None if that is nothing.

        Args:
            output: The library's `CompletionOutput`.
            now_s: `time.monotonic()`.
            cached_tokens: Prompt tokens that were found in the cache.
            prompt_logprobs: If they were asked for.

        Raises:
            StreamLost: The output lost tokens that were read before: this stream cannot go on here.
        """
        token_ids: Sequence[int] = output.token_ids
        reason, stop_token_id, end = self._find_end(output, token_ids)
        fresh = tuple(token_ids[self._read : end]) if self._params.max_tokens else ()
        if not fresh and reason is None:
            return None
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = _token_logprobs(fresh, output.logprobs or (), self._read, self._params.logprobs)
        prefill = None
        if not self._has_begun:
            prefill = self._prefill(output, now_s, cached_tokens, prompt_logprobs)
        self._has_begun = True
        self._read += len(fresh)
        self._last_token = fresh[-1] if fresh else self._last_token
        return TokenDelta(fresh, reason, stop_token_id, logprobs, prefill, now_s if fresh else 0.0)

    def _find_end(self, output: Any, token_ids: Sequence[int]) -> tuple[FinishReason | None, int | None, int]:
        """Return why and by which token the output ended, if it did, and how many tokens can be told."""
        reason = None if output.finish_reason is None else _REASONS.get(output.finish_reason, FinishReason.CANCELLED)
        stop_token_id, end = None, len(token_ids)
        if reason is FinishReason.STOP:
            stop_token_id = self._stop_token(output.stop_reason, token_ids)
            if end > self._read and token_ids[-1] == stop_token_id:
                end -= 1
        self._check_continuity(token_ids, end)
        if reason is None and self._params.logprobs is not None:
            end = min(end, max(len(output.logprobs or ()), self._read))
        if self._params.max_tokens == 0 and reason in (FinishReason.STOP, FinishReason.LENGTH):
            return FinishReason.LENGTH, None, 0
        return reason, stop_token_id, end

    def _stop_token(self, stop_reason: Any, token_ids: Sequence[int]) -> int:
        """Return which stop token it was: the library names stop words, but not the end id."""
        if isinstance(stop_reason, int):
            return stop_reason
        if token_ids and token_ids[-1] in self._params.stop_token_ids and len(token_ids) > self._read:
            return token_ids[-1]
        return self._end_id

    def _check_continuity(self, token_ids: Sequence[int], end: int) -> None:
        if end < self._read or (self._read and token_ids[self._read - 1] != self._last_token):
            raise StreamLost(
                f"the engine's output went back from {self._read} to {end} tokens, or changed; this stream cannot go on"
            )

    def _prefill(
        self, output: Any, now_s: float, cached_tokens: int, prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    ) -> PrefillInfo:
        total_s = max(0.0, now_s - self._submitted_s)
        queue_s = min(total_s, _queue_s(getattr(output, "request_perf_metrics", None)))
        return PrefillInfo(cached_tokens, queue_s, total_s - queue_s, prompt_logprobs)


def _queue_s(metrics: Any) -> float:
    """Return the time from arrival to the first step, if the library measured it; else 0."""
    timing = getattr(metrics, "timing_metrics", None)
    times = [getattr(timing, name, None) for name in ("arrival_time", "first_scheduled_time")]
    seconds = [_seconds(value) for value in times]
    if None in seconds:
        return 0.0
    waited = seconds[1] - seconds[0]  # type: ignore[operator]
    return waited if math.isfinite(waited) and waited > 0 else 0.0


def _seconds(value: Any) -> float | None:
    """Read a time: the bindings give a timedelta, records give seconds."""
    if value is None:
        return None
    return float(value.total_seconds()) if hasattr(value, "total_seconds") else float(value)


def _token_logprobs(
    token_ids: Sequence[int], entries: Sequence[Any], offset: int, count: int
) -> tuple[TokenLogprob, ...]:
    """Take the entries of some tokens out of those of the whole output.

    Raises:
        StreamLost: There is none for a token, although they were asked for.
    """
    if len(entries) < offset + len(token_ids):
        raise StreamLost(f"the engine gave {len(entries)} logprobs for {offset + len(token_ids)} tokens")
    return tuple(token_logprob(token, entries[offset + i], count) for i, token in enumerate(token_ids))


def token_logprob(token_id: int, entry: Any, count: int) -> TokenLogprob:
    """Translate one position: a mapping of token ids to `Logprob` objects, or the token's own value alone.

    Raises:
        StreamLost: The token itself is not there.
    """
    if not isinstance(entry, Mapping):
        return TokenLogprob(token_id, min(0.0, float(entry)))
    if token_id not in entry:
        raise StreamLost(f"the engine gave logprobs without the token {token_id} that stands there")
    values = {int(token): min(0.0, float(found.logprob)) for token, found in entry.items()}
    top = sorted(values.items(), key=lambda item: -item[1])[:count]
    return TokenLogprob(token_id, values[token_id], tuple(top))
