"""PromptScoring: the log probability of each token of a prompt.

Continuous batching computes logits of the last token of a prompt only, and none for what it finds in the cache. So this
is a forward pass of its own with a cache of its own, in chunks between which the batch goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from serve.core.request import TokenLogprob
from serve.engines.transformers.sampling import token_logprobs

_CHUNK_LOGITS = 1 << 24  # 64 MiB of float32


class PromptForward:
    """The forward pass over a prompt, chunk by chunk: what all ranks of a tensor-parallel group do for a score.

    Args:
        model: The model whose paged cache the batch uses; it is left as it is.
        prompt: (prompt_tokens,).
        chunk_tokens: Tokens of one chunk, at most.
    """

    def __init__(self, model: Any, prompt: npt.NDArray[np.uint32], chunk_tokens: int) -> None:
        self._model = model
        self._tokens = torch.from_numpy(prompt.astype(np.int64)).to(model.device)
        self._chunk_tokens = chunk_tokens
        self._done = 0
        self._cache: Any = DynamicCache(config=model.config)

    @property
    def is_done(self) -> bool:
        """Whether every token but the last, which predicts none of the prompt, was computed."""
        return self._done >= len(self._tokens) - 1

    def advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the next chunk of a pass that is not done.

        Returns:
            Logits, (tokens, vocab_size), float32; and the tokens that they should predict, (tokens,).
        """
        start, stop = self._done, min(self._done + self._chunk_tokens, len(self._tokens) - 1)
        with _plain_attention(self._model):
            output = self._model(
                input_ids=self._tokens[start:stop].unsqueeze(0), past_key_values=self._cache, use_cache=True
            )
        self._done = stop
        return output.logits[0].float(), self._tokens[start + 1 : stop + 1]

    def close(self) -> None:
        """Give up the pass."""


class PromptScoring:
    """A prompt that is being scored.

    Args:
        forward: Its forward pass.
        count: Likeliest tokens to name at each position.
    """

    def __init__(self, forward: PromptForward, count: int) -> None:
        self._forward = forward
        self._count = count
        self._entries: list[TokenLogprob | None] = [None]

    def advance(self) -> tuple[TokenLogprob | None, ...] | None:
        """Compute the next chunk; the result with the last one: an entry a token, None for the first."""
        if not self._forward.is_done:
            logits, targets = self._forward.advance()
            self._entries += token_logprobs(logits, targets, [self._count] * len(targets))
        return tuple(self._entries) if self._forward.is_done else None

    def close(self) -> None:
        """Give it up."""
        self._forward.close()


def chunk_tokens(max_num_tokens: int, vocab_size: int) -> int:
    """Return how many tokens of a prompt are scored at once: no more than a step has, nor than logits have room."""
    return max(1, min(max_num_tokens, _CHUNK_LOGITS // vocab_size))


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Let the model attend without a paged cache: up to 5.18 `paged|...` cannot, later ones have none."""
    name = model.config._attn_implementation
    if not name.startswith("paged|"):
        yield
        return
    model.set_attn_implementation(name.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(name)
