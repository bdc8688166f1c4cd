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


class PromptScoring:
    """A prompt that is being scored.

    Args:
        model: The model whose paged cache the batch uses; it is left as it is.
        prompt: (prompt_tokens,).
        count: Likeliest tokens to name at each position.
        max_num_tokens: Tokens of one chunk, at most.
    """

    def __init__(self, model: Any, prompt: npt.NDArray[np.uint32], count: int, max_num_tokens: int) -> None:
        self._model = model
        self._tokens = torch.from_numpy(prompt.astype(np.int64)).to(model.device)
        self._count = count
        self._chunk = max(1, min(max_num_tokens, _CHUNK_LOGITS // model.config.get_text_config().vocab_size))
        self._done = 0
        self._cache: Any = DynamicCache(config=model.config)
        self._entries: list[TokenLogprob | None] = [None]

    def advance(self) -> tuple[TokenLogprob | None, ...] | None:
        """Compute the next chunk; the result with the last one: an entry a token, None for the first."""
        start, stop = self._done, min(self._done + self._chunk, len(self._tokens) - 1)
        if start < stop:
            with _plain_attention(self._model):
                output = self._model(
                    input_ids=self._tokens[start:stop].unsqueeze(0), past_key_values=self._cache, use_cache=True
                )
            targets = self._tokens[start + 1 : stop + 1]
            self._entries += token_logprobs(output.logits[0].float(), targets, [self._count] * len(targets))
            self._done = stop
        return tuple(self._entries) if self._done == len(self._tokens) - 1 else None


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
