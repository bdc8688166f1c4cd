"""LoadReporter: counts what one replica accepts, computes and ends, and says it as a LoadReport."""

from serve.core.request import GenerateRequest, TokenDelta
from serve.core.routing.load import LoadReport
from serve.core.routing.request import route_id
from serve.engines.protocol import EngineStats


class _Sequence:
    """One that was accepted and has not ended.

    `uncached_tokens`: prompt tokens that its gateway believes will be computed; 0 once it has its first token.
    """

    __slots__ = ("blocks", "context_tokens", "request", "uncached_tokens")

    def __init__(self, request: GenerateRequest, blocks: int, uncached_tokens: int) -> None:
        self.request = request
        self.blocks = blocks
        self.context_tokens = 0
        self.uncached_tokens = uncached_tokens


class LoadReporter:
    """Sequences of one engine. Pure counting; an engine's life long. Each call names the same request object.

    Args:
        tokens_per_block: Of its KV cache.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        # By identity: an engine refuses a second request of the same id, whose end is not the end of the first.
        self._sequences: dict[int, _Sequence] = {}
        self._accepted: list[int] = []
        self._uncached_tokens = 0
        self._committed_blocks = 0
        self._context_tokens = 0
        self._told_tokens = 0  # of prompts that are complete
        self._told_pairs = 0.0
        self._prefilled_tokens = 0
        self._prefilled_pairs = 0.0
        self._generated_tokens = 0
        self._steps = 0
        self._busy_s = 0.0
        self._read_tokens = 0
        self._context_then = 0  # at the last report

    def accepted(self, request: GenerateRequest) -> None:
        """A sequence is about to be given to the engine."""
        tokens = request.prompt_tokens
        blocks = -(-(tokens + request.sampling.max_tokens) // self._tokens_per_block)
        uncached = max(0, tokens - request.expected_cached_tokens)
        self._sequences[id(request)] = _Sequence(request, blocks, uncached)
        self._uncached_tokens += uncached
        self._committed_blocks += blocks
        self._accepted.append(route_id(request.request_id))

    def delta(self, request: GenerateRequest, delta: TokenDelta) -> bool:
        """A sequence got tokens; return whether they are its first."""
        sequence = self._sequences.get(id(request))
        if sequence is None:
            return False
        tokens = len(delta.token_ids)
        is_first = delta.prefill is not None
        if delta.prefill is not None:
            cached = delta.prefill.cached_tokens
            computed = max(0, request.prompt_tokens - cached)
            self._told_tokens += computed
            self._told_pairs += computed * cached + computed * (computed + 1) * 0.5
            self._uncached_tokens -= sequence.uncached_tokens
            sequence.uncached_tokens = 0
            tokens += request.prompt_tokens
        sequence.context_tokens += tokens
        self._context_tokens += tokens
        return is_first

    def ended(self, request: GenerateRequest) -> None:
        """A sequence is over, whatever the reason; harmless if it is unknown."""
        sequence = self._sequences.pop(id(request), None)
        if sequence is None:
            return
        self._uncached_tokens -= sequence.uncached_tokens
        self._context_tokens -= sequence.context_tokens
        self._committed_blocks -= sequence.blocks

    def forget_totals(self) -> None:
        """Let all totals of the engine's work begin at 0 again: it may have been started anew."""
        self._told_tokens = self._prefilled_tokens = self._generated_tokens = self._steps = 0
        self._told_pairs = self._prefilled_pairs = self._busy_s = 0.0
        self._read_tokens = self._context_then = 0

    def report(self, stats: EngineStats) -> LoadReport:
        """Return the load. The next report's `accepted` begins after this one.

        Args:
            stats: The engine's, of this moment.
        """
        self._take_totals(stats)
        accepted, self._accepted = tuple(self._accepted), []
        return LoadReport(
            running=stats.running,
            waiting=stats.waiting,
            # What waits in the engine may turn out to be cached: the gateway knows by the hashes before it does.
            queued_prefill_tokens=min(stats.queued_prefill_tokens, self._uncached_tokens),
            used_blocks=stats.used_blocks,
            total_blocks=stats.total_blocks,
            committed_blocks=self._committed_blocks,
            context_tokens=self._context_tokens,
            prefilled_tokens=self._prefilled_tokens,
            prefilled_pairs=self._prefilled_pairs,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            busy_s=self._busy_s,
            read_tokens=self._read_tokens,
            accepted=accepted,
        )

    def _take_totals(self, stats: EngineStats) -> None:
        """Totals stay where they were if the engine says nothing any more: it has died."""
        self._generated_tokens = max(self._generated_tokens, stats.generated_tokens)
        new_steps = max(0, stats.steps - self._steps)
        self._steps += new_steps
        # Of reports as close as these, half the sum is the mean, near enough.
        self._read_tokens += new_steps * (self._context_then + self._context_tokens) // 2
        self._context_then = self._context_tokens
        self._busy_s = max(self._busy_s, stats.busy_s)
        # Engines count prompts as they compute them, chunk by chunk. Of one that does not, what was told when they were
        # complete has to do; and of one that counts tokens only, the pairs that these usually have.
        tokens = stats.computed_prompt_tokens or self._told_tokens
        pairs = stats.computed_prompt_pairs
        if not pairs and self._told_tokens:
            pairs = self._told_pairs * tokens / self._told_tokens
        self._prefilled_tokens = max(self._prefilled_tokens, tokens)
        self._prefilled_pairs = max(self._prefilled_pairs, pairs)
