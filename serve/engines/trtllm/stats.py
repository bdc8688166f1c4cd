"""PURE: iteration statistics of TensorRT-LLM and the adapter's own counts -> EngineStats.

The library's records come late (up to 0.2 s, and only while steps are computed), and 1.2.x and the newest line differ
in what they hold. The adapter's own counts are exact and there at once, but know nothing of KV blocks and of who is
in the batch. So: what was submitted and what was told is counted here, what the library alone knows is taken from its
last record while it is fresh.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.engines.protocol import EngineStats

FRESH_S = 1.0
_LARGEST = 1e15
_MAX_LOST_FACTOR = 10  # steps counted for one that was read: a number that jumps says nothing


@dataclass(frozen=True)
class IterationRecord:
    """One step, as the library tells it; None: it does not.

    Attributes:
        step_s: Its duration.
        active: Requests the executor knows, waiting ones included.
        queued: Requests that have no place yet.
        prefill_tokens: Prompt tokens that it computed.
        used_blocks, total_blocks: KV blocks on the GPU; blocks kept for reuse alone count as free.
    """

    step_s: float = 0.0
    active: int | None = None
    queued: int | None = None
    used_blocks: int | None = None
    total_blocks: int | None = None
    prefill_tokens: int = 0


class StepTotals(NamedTuple):
    """Steps since the start, and how long they took together, as far as the library told of them.

    Its queue of records is bounded (`iter_stats_max_iterations`), so that some are lost when a read comes late. The
    numbers of the others say how many; each of them counts as long as the mean of those that were read with it.

    Attributes:
        prefill_tokens: Prompt tokens that they computed.
        last: Number of the last step; None before the first.
    """

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    last: int | None = None

    def add(self, records: Sequence[Mapping[str, Any]]) -> "StepTotals":
        """Count the steps of these records; none if the library gives no durations."""
        timed = [record for record in records if (_number(record, "iterLatencyMS") or 0.0) > 0.0]
        if not timed:
            return self
        read = [read_record(record) for record in timed]
        number, steps = _count(timed[-1], "iter"), len(timed)
        if number is not None and self.last is not None:
            steps = min(max(steps, number - self.last), _MAX_LOST_FACTOR * steps)
        share = steps / len(timed)
        return StepTotals(
            steps=self.steps + steps,
            busy_s=self.busy_s + share * sum(record.step_s for record in read),
            prefill_tokens=self.prefill_tokens + round(share * sum(record.prefill_tokens for record in read)),
            last=self.last if number is None else number,
        )


@dataclass(frozen=True)
class OwnCounts:
    """What the adapter knows at once.

    Attributes:
        submitted: Requests in flight whose first token has not come.
        streaming: Requests in flight whose first token has come.
        queued_prefill_tokens: Prompt tokens of the former.
        blocks_at_most: KV blocks that all of these can hold together, none shared.
        prompt_tokens, cached_prompt_tokens, generated_tokens: Totals since the start.
    """

    submitted: int = 0
    streaming: int = 0
    queued_prefill_tokens: int = 0
    blocks_at_most: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


def read_record(record: Mapping[str, Any]) -> IterationRecord:
    """Read one record; whatever is missing or of another type is left out."""
    kv = record.get("kvCacheStats")
    kv = kv if isinstance(kv, Mapping) else {}
    batch = record.get("inflightBatchingStats")
    batch = batch if isinstance(batch, Mapping) else {}
    return IterationRecord(
        step_s=max(0.0, (_number(record, "iterLatencyMS") or 0.0) / 1000),
        active=_count(record, "numActiveRequests"),
        queued=_count(record, "numQueuedRequests"),
        used_blocks=_count(kv, "usedNumBlocks"),
        total_blocks=_count(kv, "maxNumBlocks"),
        prefill_tokens=_count(batch, "numCtxTokens") or 0,
    )


def waiting_of(own: OwnCounts, record: IterationRecord | None, max_batch_size: int) -> int:
    """Return how many requests wait for a place: those that exceed the batch, or more if the library says so.

    Args:
        own: The adapter's counts.
        record: The last one, if it is fresh.
        max_batch_size: Sequences that are computed together, at most.
    """
    beyond_batch = max(0, own.submitted + own.streaming - max_batch_size)
    told = record.queued if record is not None and record.queued is not None else 0
    return max(beyond_batch, min(own.submitted, told))


def engine_stats(
    own: OwnCounts,
    record: IterationRecord | None,
    totals: StepTotals,
    *,
    max_batch_size: int,
    total_blocks: int,
    reusable_blocks: int,
) -> EngineStats:
    """Put both together.

    Args:
        own: The adapter's counts.
        record: The last one, if it is fresh.
        totals: Of the library's steps.
        max_batch_size: Sequences that are computed together, at most.
        total_blocks: KV blocks on the GPU.
        reusable_blocks: Those of them with content that the KV events have told of; of running sequences too.
    """
    waiting = waiting_of(own, record, max_batch_size)
    used = own.blocks_at_most
    if record is not None and record.used_blocks is not None and own.streaming:
        used = min(used, max(record.used_blocks, own.streaming))
    used = min(used, total_blocks)
    return EngineStats(
        running=own.submitted + own.streaming - waiting,
        waiting=waiting,
        used_blocks=used,
        cached_blocks=max(0, min(reusable_blocks, total_blocks - used)),
        total_blocks=total_blocks,
        queued_prefill_tokens=own.queued_prefill_tokens,
        step_s=record.step_s if record is not None else 0.0,
        prompt_tokens=own.prompt_tokens,
        cached_prompt_tokens=own.cached_prompt_tokens,
        generated_tokens=own.generated_tokens,
        steps=totals.steps,
        busy_s=totals.busy_s,
        # The records count chunk by chunk, but some may be lost; what is complete is known anyway.
        computed_prompt_tokens=max(totals.prefill_tokens, own.prompt_tokens - own.cached_prompt_tokens),
    )


def retry_after_s(record: IterationRecord | None, waiting: int, max_batch_size: int) -> float:
    """Estimate when a place is free again: a guess of a hundred steps a sequence, shared by the batch."""
    step_s = record.step_s if record is not None and record.step_s else 0.02
    return min(30.0, max(0.5, 100 * step_s * max(1.0, waiting / max_batch_size)))


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def _count(record: Mapping[str, Any], name: str) -> int | None:
    value = _number(record, name)
    return None if value is None or value < 0 else int(value)
