"""PURE: which requests can be computed at all, and when the next one in the queue may begin."""

from serve.core.request import GenerateRequest
from serve.engines import request_checks
from serve.engines.protocol import EngineInfo


def check_request(request: GenerateRequest, info: EngineInfo, capacity_tokens: int) -> None:
    """Check what only the engine knows: its vocabulary, its context and its cache.

    Args:
        request: Its sampling parameters are in their documented ranges.
        info: Of the engine.
        capacity_tokens: Longest sequence that the KV cache holds if there is no other.

    Raises:
        RequestError: The request can never be served here.
    """
    request_checks.check_request(request, info, capacity_tokens, "kv_cache_tokens")


def may_begin(*, running: int, max_batch_size: int, needed_blocks: int, promised_blocks: int, free_blocks: int) -> bool:
    """Decide whether the sequence at the head of the queue may take its place in the batch.

    Every running sequence is left a block to grow into, so that a new one seldom takes the blocks that an old one
    needs at its next step: the library would then throw out the newer of them and compute its prompt again.

    Args:
        running: Sequences in the batch.
        max_batch_size: Its limit.
        needed_blocks: Blocks of the prompt that are not in the cache, one for the first output included.
        promised_blocks: Blocks that running sequences still have to take for their prompts.
        free_blocks: Blocks that nobody uses, with content or without; those the prompt would reuse not counted.
    """
    if running == 0:
        return True  # it fits an empty cache, or it would have been refused
    return running < max_batch_size and needed_blocks + promised_blocks + running <= free_blocks


def queue_places(*, running: int, queued: int, max_batch_size: int, max_waiting: int) -> int:
    """Return how many requests may wait, those included that have arrived and not been looked at yet.

    Args:
        running: Sequences in the batch.
        queued: Sequences that were looked at and found no room.
        max_batch_size: Limit of the batch.
        max_waiting: Limit of the queue.
    """
    return max_waiting if queued else max_waiting + max(0, max_batch_size - running)


def retry_after_s(interval_s: float, waiting: int, max_batch_size: int) -> float:
    """Estimate when a place in the queue is free again.

    Args:
        interval_s: Usual time between two sequences that begin; 0 if unknown.
        waiting: Length of the queue.
        max_batch_size: Sequences that advance together.
    """
    return min(30.0, max(0.5, interval_s * max(1.0, waiting / max_batch_size)))
