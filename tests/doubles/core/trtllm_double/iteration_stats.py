"""Records of iterations and requests, with upstream's keys (reference 2.6)."""

import time
from dataclasses import dataclass
from typing import Any

from trtllm_double.cache import BlockCache
from trtllm_double.sequence import Sequence


@dataclass(frozen=True)
class StepWork:
    """What one step did: requests and tokens of it, and requests that came and went since the last one."""

    seconds: float
    scheduled: int
    contexts: int
    context_tokens: int
    new_active: int
    completed: int


def iteration_record(iteration: int, work: StepWork, cache: BlockCache, max_batch_size: int) -> dict[str, Any]:
    """Return one iteration's record, without the numbers of active and queued requests."""
    missed, reused = cache.missed, cache.reused
    return {
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
        "iter": iteration,
        "iterLatencyMS": work.seconds * 1000,
        "newActiveRequestsQueueLatencyMS": 0.0,
        "numNewActiveRequests": work.new_active,
        "numCompletedRequests": work.completed,
        "maxNumActiveRequests": max_batch_size,
        "gpuMemUsage": 1 << 30,
        "cpuMemUsage": 0,
        "pinnedMemUsage": 0,
        "kvCacheStats": {
            "maxNumBlocks": cache.primary,
            "freeNumBlocks": cache.primary - cache.used,
            "usedNumBlocks": cache.used,
            "tokensPerBlock": cache.tokens_per_block,
            "allocTotalBlocks": cache.alloc_total,
            "allocNewBlocks": cache.alloc_new,
            "reusedBlocks": reused,
            "missedBlocks": missed,
            "cacheHitRate": reused / (reused + missed) if reused + missed else 0.0,
        },
        "inflightBatchingStats": {
            "numScheduledRequests": work.scheduled,
            "numContextRequests": work.contexts,
            "numGenRequests": work.scheduled - work.contexts,
            "numPausedRequests": 0,
            "numCtxTokens": work.context_tokens,
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        },
    }


def request_metrics(sequence: Sequence) -> dict[str, float]:
    """Reference 6.3: seconds; TPOT only for more than one token."""
    now = time.perf_counter()
    first, count = sequence.first_token_s or now, len(sequence.output)
    metrics = {"ttft": first - sequence.arrived_s, "e2e": now - sequence.arrived_s}
    metrics["request_queue_time"] = (sequence.scheduled_s or now) - sequence.arrived_s
    if count > 1:
        metrics["tpot"] = (now - first) / (count - 1)
    return metrics


def request_record(sequence: Sequence, cache: BlockCache) -> dict[str, Any]:
    """Return one request's record."""
    stage = (
        "QUEUED" if sequence.holding is None else "GENERATION_IN_PROGRESS" if sequence.output else "CONTEXT_IN_PROGRESS"
    )
    prompt = len(sequence.request.prompt)
    return {
        "id": sequence.request.id,
        "stage": stage,
        "contextPrefillPosition": min(sequence.computed, prompt),
        "numGeneratedTokens": len(sequence.output),
        "avgNumDecodedTokensPerIter": 1.0,
        "scheduled": sequence.holding is not None,
        "paused": False,
        "allocTotalBlocksPerRequest": cache.blocks_for(prompt) - sequence.cached // cache.tokens_per_block,
        "allocNewBlocksPerRequest": cache.blocks_for(prompt) - sequence.cached // cache.tokens_per_block,
        "reusedBlocksPerRequest": sequence.cached // cache.tokens_per_block,
        "missedBlocksPerRequest": cache.blocks_for(prompt) - sequence.cached // cache.tokens_per_block,
        "kvCacheHitRatePerRequest": sequence.cached / prompt,
    }
