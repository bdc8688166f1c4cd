"""SchedulerLimits: what an engine can hold, and by which rules it fills itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes and rules of one engine.

    Attributes:
        total_blocks, tokens_per_block: The KV cache.
        max_batch_size: Sequences in the batch.
        max_num_tokens: Tokens computed in one step, prompts' and outputs' together; >= max_batch_size.
        chunked_prefill: Whether a prompt can be computed in several steps; if not, none may exceed `max_num_tokens`.
        guaranteed_no_evict: Whether admission promises all blocks. If not, sequences may be preempted.
        share_prefixes: Whether blocks are reused.
    """

    total_blocks: int
    tokens_per_block: int = 32
    max_batch_size: int = 256
    max_num_tokens: int = 8192
    chunked_prefill: bool = True
    guaranteed_no_evict: bool = True
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        room = self.max_num_tokens - self.max_batch_size
        if room < (self.tokens_per_block if self.chunked_prefill else 0):
            raise ValueError(
                f"max_num_tokens={self.max_num_tokens} cannot hold max_batch_size={self.max_batch_size} decoding "
                f"sequences and a chunk of tokens_per_block={self.tokens_per_block} prompt tokens; raise the first"
            )

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether a sequence can ever be admitted."""
        tokens = max(prompt_tokens, prompt_tokens + max_tokens - 1)  # the last token's keys and values are not needed
        if -(-tokens // self.tokens_per_block) > self.total_blocks:
            return False
        # A sequence that was preempted is computed again with the output that it has.
        longest = prompt_tokens if self.guaranteed_no_evict else tokens
        return self.chunked_prefill or longest <= self.max_num_tokens
