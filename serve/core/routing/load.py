"""LoadReport: what a replica says of its load, many times a second."""

import msgspec


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """Load of one replica at one moment. Totals count from the engine's start and never fall within an epoch.

    Attributes:
        running: Sequences in the batch.
        waiting: Sequences accepted that have no KV blocks yet.
        queued_prefill_tokens: Prompt tokens accepted and neither computed nor found in the cache yet.
        used_blocks: KV blocks that sequences in the batch hold.
        total_blocks: All there are.
        committed_blocks: What all accepted sequences would hold at their `max_tokens`, shared blocks counted each time.
        context_tokens: Prompt and output tokens of the sequences that have their first token.
        prefilled_tokens: Total of prompt tokens that were computed, counted chunk by chunk: the engine's speed is
            learned from what it did between two reports.
        prefilled_pairs: Total of (query, key) pairs of their attention: a chunk of u tokens after s others has
            u * s + u * (u + 1) / 2.
        generated_tokens: Total of output tokens.
        steps: Total of engine steps; 0 if the engine does not count them.
        busy_s: Total duration of those steps.
        read_tokens: Total over all steps of the tokens whose keys and values decoding sequences read.
        accepted: `route_id` of each sequence accepted since the report before this one.
    """

    running: int = 0
    waiting: int = 0
    queued_prefill_tokens: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    committed_blocks: int = 0
    context_tokens: int = 0
    prefilled_tokens: int = 0
    prefilled_pairs: float = 0.0
    generated_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0
    read_tokens: int = 0
    accepted: tuple[int, ...] = ()
