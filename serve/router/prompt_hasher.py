"""PromptHasher: prompts -> hashes of their KV blocks, each prompt once."""

from typing import NamedTuple

import numpy as np

from serve.core.blocks import ROOT, Hashes, block_hashes, chain_seed
from serve.core.request import GenerateRequest
from serve.core.routing.miss_reasons import PromptBlocks

_NONE: Hashes = np.empty(0, dtype=np.uint64)


class HashedPrompt(NamedTuple):
    """A prompt in blocks.

    Attributes:
        tokens: How many it has.
        tokens_per_block: Size of a block.
        hashes: Of its full blocks, chained to the seed of its salt and adapter.
        content: Of the same tokens, chained to the seed of no salt and no adapter; empty if that is the same.
        cache_salt, lora: What the seed was made of.
    """

    tokens: int
    tokens_per_block: int
    hashes: Hashes
    content: Hashes
    cache_salt: str
    lora: str

    @property
    def seed(self) -> int:
        """Hash that the first block is chained to."""
        return chain_seed(self.cache_salt, self.lora)

    def reusable(self) -> PromptBlocks:
        """Return the blocks that a cache can spare: the one with the prompt's last token is computed always."""
        usable = (self.tokens - 1) // self.tokens_per_block
        return PromptBlocks(self.hashes[:usable], self.content[:usable], self.cache_salt, self.lora)


class PromptHasher:
    """Hashes prompts of one model. Remembers the last: n sequences of one request share their prompt.

    Args:
        tokens_per_block: Of the replicas' KV caches.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._size = tokens_per_block
        self._last: tuple[bytes, HashedPrompt] | None = None

    def hashed(self, request: GenerateRequest) -> HashedPrompt:
        """Return a request's prompt in blocks, under its salt and adapter."""
        prompt, salt, lora = request.prompt, request.cache_salt, request.lora
        if self._last is not None:
            last, hashed = self._last
            if last is prompt and (hashed.cache_salt, hashed.lora) == (salt, lora):
                return hashed
        tokens = request.prompt_array()
        hashes = block_hashes(tokens, self._size, chain_seed(salt, lora) if salt or lora else ROOT)
        content = block_hashes(tokens, self._size) if salt or lora else _NONE
        hashed = HashedPrompt(request.prompt_tokens, self._size, hashes, content, salt, lora)
        self._last = (prompt, hashed)
        return hashed
