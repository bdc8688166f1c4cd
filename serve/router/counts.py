"""RoutingCounts: what the routing of one model counts, for /metrics."""

from collections import Counter

from serve import telemetry
from serve.core.histogram import Histogram
from serve.core.top_labels import TopLabels
from serve.router.trace import RouteTrace

DEFAULT_TENANT = "default"


class RoutingCounts:
    """Numbers of one model in one gateway process; plain attributes of one event loop.

    Attributes:
        decisions: By policy and the rule that decided.
        refusals: Choices that a replica did not take.
        decision_s: How long decisions took: hashing, matching, scoring.
        prompt_tokens, expected_tokens, cached_tokens: Of sequences that have their first token: all, those that the
            replica was believed to hold, and those that it reused.
        missed_blocks: Prompt blocks that had to be computed, by tenant and reason.
        ttft_ratio: Predicted time to first token over the real one.
    """

    __slots__ = (
        "_tenants",
        "cached_tokens",
        "decision_s",
        "decisions",
        "expected_tokens",
        "missed_blocks",
        "prompt_tokens",
        "refusals",
        "ttft_ratio",
    )

    def __init__(self) -> None:
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.refusals = 0
        self.decision_s = Histogram(telemetry.ROUTING_DECISION.buckets)
        self.prompt_tokens = self.expected_tokens = self.cached_tokens = 0
        self.missed_blocks: Counter[tuple[str, str]] = Counter()
        self.ttft_ratio = Histogram(telemetry.ROUTING_TTFT_RATIO.buckets)
        self._tenants = TopLabels()

    def count_decision(self, trace: RouteTrace, took_s: float) -> None:
        """Count a decision."""
        self.decision_s.observe(took_s)
        if trace.decision is not None:
            self.decisions[trace.decision.policy, trace.decision.rule] += 1

    def count_misses(self, trace: RouteTrace) -> None:
        """Count why prompt blocks of a sequence have to be computed."""
        tenant = self._tenants.label(trace.hints.tenant or DEFAULT_TENANT)
        for span in trace.misses:
            self.missed_blocks[tenant, span.reason] += span.num_blocks
        while self._tenants.retired:
            gone = self._tenants.retired.pop()
            for key in [key for key in self.missed_blocks if key[0] == gone]:
                del self.missed_blocks[key]

    def count_first_token(self, trace: RouteTrace) -> None:
        """Compare what was expected with what came true."""
        if trace.prefill is not None:
            self.prompt_tokens += trace.prompt_tokens
            self.expected_tokens += trace.expected_tokens
            self.cached_tokens += trace.prefill.cached_tokens
        took_s = trace.first_s - trace.decided_s
        if trace.predicted_ttft_s is not None and took_s > 0.0:
            self.ttft_ratio.observe(trace.predicted_ttft_s / took_s)
