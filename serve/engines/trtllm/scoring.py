"""Log probabilities of a prompt's tokens, from the logits that the engine returns.

Not by TensorRT-LLM's own `prompt_logprobs`: a position's entry there may lack the token that follows (1.2.x), or hold
the one that stands there instead (TensorRT-LLM#12447).
"""

from collections.abc import Sequence
from typing import Any

from serve.core.request import TokenLogprob
from serve.errors import RequestError

_ROWS = 256  # positions that are turned into log probabilities at once, to bound the memory


def prompt_logprobs(logits: Any, prompt: Sequence[int], count: int) -> tuple[TokenLogprob | None, ...]:
    """Score a prompt. Takes long for a long one: call it in a thread.

    Args:
        logits: (num_tokens, vocab_size), a tensor; row i predicts token i + 1. A leading axis of 1 is dropped.
        prompt: Its token ids.
        count: How many of the likeliest tokens to tell at each position.

    Returns:
        One entry a token; None for the first.

    Raises:
        RequestError: Rows are missing: the engine did not compute the whole prompt.
    """
    if logits.dim() == 3 and logits.shape[0] == 1:
        logits = logits[0]
    if logits.shape[0] < len(prompt) - 1:
        raise RequestError(
            f"prompt_logprobs: the engine told only {logits.shape[0]} of {len(prompt)} prompt tokens (others "
            "were reused from its cache); have the operator set engine.kv_cache.block_reuse: false",
            "prompt_logprobs",
            "unsupported_parameter",
        )
    entries: list[TokenLogprob | None] = [None]
    for start in range(0, len(prompt) - 1, _ROWS):
        targets = list(prompt[start + 1 : start + 1 + _ROWS])
        rows = logits[start : start + len(targets)].float().log_softmax(-1).clamp(max=0.0)
        own = rows[range(len(targets)), targets].tolist()
        top = rows.topk(count)
        for target, value, tokens, values in zip(targets, own, top.indices.tolist(), top.values.tolist(), strict=True):
            entries.append(TokenLogprob(target, value, tuple(zip(tokens, values, strict=True))))
    return tuple(entries)
