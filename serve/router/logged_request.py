"""RouteTrace -> line of the request log: sizes, times and hashes; no text, no token ids, no names of sessions."""

from collections.abc import Sequence

from serve.core.blocks import block_hashes
from serve.core.request import GenerateRequest
from serve.core.request_log import LoggedRequest, pack_hashes, pseudonym
from serve.router.prompt_hasher import HashedPrompt, PromptHasher
from serve.router.records import short_id
from serve.router.trace import RouteTrace


def logged_request(trace: RouteTrace, request: GenerateRequest, now_s: float, tokens_per_block: int) -> LoggedRequest:
    """Return the line of a sequence that has ended.

    Args:
        trace: The sequence; it has ended.
        request: What was sent.
        now_s: Seconds since 1970.
        tokens_per_block: Of the replicas' KV caches.
    """
    prompt = trace.prompt or PromptHasher(tokens_per_block).hashed(request)
    arrived_s = trace.hints.arrived_s or trace.announced_s
    return LoggedRequest(
        arrival_s=now_s - (trace.ended_s - arrived_s),
        route_id=trace.route_id,
        tokens_per_block=prompt.tokens_per_block,
        prompt_tokens=trace.prompt_tokens,
        max_tokens=trace.max_tokens if trace.hints.limited else 0,
        output_tokens=trace.output_tokens,
        prompt_hashes=pack_hashes(prompt.hashes),
        output_hashes=pack_hashes(_output_hashes(request, prompt, trace.output or ())),
        tenant=trace.hints.tenant,
        session=pseudonym(trace.hints.session),
        lora=trace.lora,
        model=trace.model,
        replica=short_id(trace.replica_id),
        finish_reason=trace.finish_reason or ("cancelled" if trace.state == "cancelled" else ""),
        cached_tokens=trace.prefill.cached_tokens if trace.prefill is not None else 0,
        ttft_s=trace.first_s - arrived_s if trace.first_s else 0.0,
        duration_s=trace.ended_s - arrived_s,
    )


def _output_hashes(request: GenerateRequest, prompt: HashedPrompt, output: Sequence[int]) -> Sequence[int]:
    """Return the hashes of the blocks that the output completed. The last token's keys and values are never made."""
    size = prompt.tokens_per_block
    rest = request.prompt_array()[len(prompt.hashes) * size :].tolist()
    parent = int(prompt.hashes[-1]) if len(prompt.hashes) else prompt.seed
    hashes: Sequence[int] = block_hashes([*rest, *output[:-1]], size, parent).tolist()
    return hashes
