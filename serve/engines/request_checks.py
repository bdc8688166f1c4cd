"""PURE: what every engine checks of a request: what the gateway cannot know, the vocabulary, context and cache."""

from serve.core.request import GenerateRequest
from serve.engines.protocol import EngineInfo
from serve.errors import ContextTooLong, RequestError


def check_request(request: GenerateRequest, info: EngineInfo, capacity_tokens: int, capacity_setting: str) -> None:
    """Check a request whose sampling parameters are in their documented ranges.

    Args:
        request: What is asked for.
        info: Of the engine.
        capacity_tokens: Longest sequence that the KV cache holds if there is no other.
        capacity_setting: What an operator can raise to get more.

    Raises:
        RequestError: The request can never be served here.
    """
    prompt, sampling = request.prompt_array(), request.sampling
    if not len(prompt):
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    if request.lora:
        raise RequestError(f"lora: {request.lora!r} is not loaded, and the base model is not it; leave it out", "lora")
    unknown = int(prompt.max())
    if unknown >= info.vocab_size:
        raise RequestError(
            f"prompt: token id {unknown} is not below the vocabulary size {info.vocab_size}; use the model's tokenizer",
            "prompt",
        )
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        bad = [token_id for token_id in ids if not 0 <= token_id < info.vocab_size]
        if bad:
            raise RequestError(
                f"{name}: token id {bad[0]} is not in [0, {info.vocab_size}), the model's vocabulary; remove it", name
            )
    for name, count in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if count is not None and not 0 <= count <= info.max_logprobs:
            raise RequestError(f"{name}: {count} is not in [0, {info.max_logprobs}]; lower it", name)
    if len(prompt) + sampling.max_tokens > info.context_tokens:
        raise ContextTooLong(len(prompt), sampling.max_tokens, info.context_tokens, "prompt")
    if sampling.max_tokens and len(prompt) + sampling.max_tokens > capacity_tokens:
        raise RequestError(
            f"prompt and max_tokens make {len(prompt) + sampling.max_tokens} tokens, but the replica's KV cache holds "
            f"{capacity_tokens}; shorten the prompt, lower max_tokens, or have the operator raise {capacity_setting}",
            "max_tokens",
            "kv_cache_too_small",
        )
