"""ScheduledSequence: one request on its way through the scheduler."""

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar


class SequenceState(IntEnum):
    """Where a sequence is."""

    NEW = 0
    WAITING = 1
    PREFILL = 2
    DECODE = 3
    DONE = 4


class ScheduledSequence:
    """One request, in tokens and block hashes; what the tokens are, the scheduler never asks.

    Args:
        request_id: For whoever reads the results.
        prompt_tokens: > 0.
        hashes: Hashes of the prompt's full blocks, chained; the list is extended as output fills blocks.
        root: Parent of the first hash: the seed of the chain.
        max_tokens: >= 0; KV blocks are set aside for so many output tokens.
        output_tokens: How many there will be, if that is known to be fewer.
        next_hash: Called with the number of a block, when output has filled it, to learn its hash. None: blocks with
            output in them are not shared.

    Attributes:
        cached_tokens: Leading prompt tokens found in the cache, once admitted.
        arrived_s, started_s, first_token_s, finished_s: When it was submitted, its first step began, its first token
            was ready and its last. Of the caller's clock; -1 before.
        preemptions: How often it lost its blocks and had to begin again.
    """

    __slots__ = (
        "arrived_s",
        "cached_tokens",
        "computed_tokens",
        "entered",
        "filled_blocks",
        "finished_s",
        "first_token_s",
        "hashes",
        "max_tokens",
        "next_hash",
        "open_blocks",
        "output_tokens",
        "pledged_blocks",
        "preemptions",
        "prefill_tokens",
        "produced_tokens",
        "prompt_tokens",
        "request_id",
        "root",
        "serial",
        "started_as",
        "started_s",
        "state",
    )

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        hashes: list[int],
        *,
        root: int,
        max_tokens: int,
        output_tokens: int | None = None,
        next_hash: Callable[[int], int] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.hashes = hashes
        self.root = root
        self.max_tokens = max_tokens
        self.output_tokens = max_tokens if output_tokens is None else min(output_tokens, max_tokens)
        self.next_hash = next_hash
        self.state = SequenceState.NEW
        self.serial = 0  # order of arrival
        self.started_as = 0  # order of admission
        self.cached_tokens = 0
        self.prefill_tokens = prompt_tokens  # what has to be computed before the next token: output too, if preempted
        self.computed_tokens = 0  # of prefill_tokens, those whose keys and values are there
        self.produced_tokens = 0  # output tokens before the present decode phase
        self.entered = 0  # the scheduler's decode count when that phase began
        self.filled_blocks = 0  # blocks in use that have a hash
        self.open_blocks = 0  # blocks in use that have none
        self.pledged_blocks = 0  # blocks promised and not taken yet
        self.preemptions = 0
        self.arrived_s = self.started_s = self.first_token_s = self.finished_s = -1.0

    def total_blocks(self, tokens_per_block: int) -> int:
        """Return how many blocks it holds at its end; the last token's keys and values are never computed."""
        return -(-max(self.prompt_tokens + self.max_tokens - 1, self.prompt_tokens) // tokens_per_block)


SequenceT = TypeVar("SequenceT", bound=ScheduledSequence)
