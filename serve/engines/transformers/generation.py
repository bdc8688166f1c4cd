"""Generation: one request on the engine's thread, from its arrival to its last delta."""

import numpy as np
import torch

from serve.core.request import (
    FinishReason,
    GenerateRequest,
    PrefillInfo,
    TokenDelta,
    TokenLogprob,
)
from serve.engines.transformers.block_chain import BlockChain
from serve.engines.transformers.sampling import SamplerRow
from serve.engines.transformers.stream import Stream

PromptLogprobs = tuple[TokenLogprob | None, ...]


class Generation:
    """What the engine's thread knows of one request.

    Args:
        name: Unique in the engine.
        request: As it came.
        stream: Where its deltas go.
        submitted_s: `time.monotonic()` of its arrival.

    Attributes:
        prompt_logprobs: Once they are computed, if they were asked for.
        cached_tokens: Leading prompt tokens that were found in the cache.
        computed_tokens: Tokens that took part in steps.
        begun_s: `time.monotonic()` of the first computation for it.
        was_scheduled: Whether it took part in a step of the batch.
        num_output: Tokens it has got.
    """

    def __init__(self, name: str, request: GenerateRequest, stream: Stream, submitted_s: float) -> None:
        self.name = name
        self.request = request
        self.stream = stream
        self.submitted_s = submitted_s
        self.prompt_logprobs: PromptLogprobs | None = None
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.begun_s: float | None = None
        self.was_scheduled = False
        self.num_output = 0
        self._sent_first = False

    def prepare(self, tokens_per_block: int, secret: bytes, seed: int, vocab_size: int, device: torch.device) -> None:
        """Make what only a request that is going to be computed needs."""
        sampling = self.request.sampling
        self.chain = BlockChain(self.request.prompt, tokens_per_block, self.request.cache_salt, secret)
        own_seed = seed if sampling.seed is None else sampling.seed
        prompt = np.asarray(self.request.prompt_array())
        self.row = SamplerRow(sampling, prompt, own_seed, vocab_size, device)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that are neither computed nor found in the cache."""
        if self.num_output:
            return 0
        found = self.cached_tokens if self.was_scheduled else 0
        return max(0, self.request.prompt_tokens - found - self.computed_tokens)

    def emit(self, token_id: int, logprob: TokenLogprob | None, now_s: float) -> TokenDelta:
        """Return the delta that a new token makes; the last one, if the token ends the sequence."""
        sampling = self.request.sampling
        prefill = self._prefill(now_s)
        if token_id in sampling.stop_token_ids:
            logprobs = () if sampling.logprobs is not None else None
            return TokenDelta((), FinishReason.STOP, token_id, logprobs, prefill)
        self.num_output += 1
        is_last = self.num_output >= sampling.max_tokens
        return TokenDelta(
            token_ids=(token_id,),
            finish_reason=FinishReason.LENGTH if is_last else None,
            logprobs=None if logprob is None else (logprob,),
            prefill=prefill,
            emitted_s=now_s,
        )

    def emit_nothing(self, now_s: float) -> TokenDelta:
        """Return the only delta of a request for no tokens."""
        return TokenDelta((), FinishReason.LENGTH, None, None, self._prefill(now_s))

    def _prefill(self, now_s: float) -> PrefillInfo | None:
        if self._sent_first:
            return None
        self._sent_first = True
        begun_s = self.begun_s if self.begun_s is not None else now_s
        return PrefillInfo(
            self.cached_tokens, begun_s - self.submitted_s, now_s - begun_s, prompt_logprobs=self.prompt_logprobs
        )
