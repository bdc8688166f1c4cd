"""RouteRecord: what people are told about the routing of one sequence; made from its RouteTrace when they ask."""

import math

from msgspec import Struct

from serve.core.request_log import pseudonym
from serve.core.routing.decision import Column, Decision
from serve.router.trace import KEPT_CANDIDATES, RouteTrace


class HitBlocks(Struct, frozen=True):
    """Leading blocks of the prompt that a replica holds, by the tier where they lie."""

    gpu: int
    host: int
    disk: int


class Candidate(Struct, frozen=True):
    """A replica that could have got the sequence, as the gateway knew it.

    Attributes:
        replica: Its id, as Ray Serve's logs and `serve status` show it.
        rank: 1 is the policy's first choice.
        chosen: Whether it got the sequence.
        cost: What the policy minimises; null: never.
        terms: What the cost consists of.
        hit_blocks: What it holds of the prompt.
        predicted_ttft_s: Seconds from the decision to the first token; null if the policy predicts none.
        running, waiting: Sequences in its batch, and those before it, with those on the way to it.
        queued_prefill_tokens: Prompt tokens to compute before this prompt.
        active_blocks, total_blocks: KV blocks in use, and all.
        report_age_s: Since it was last heard of.
    """

    replica: str
    rank: int
    chosen: bool
    cost: float | None
    terms: dict[str, float | None]
    hit_blocks: HitBlocks
    predicted_ttft_s: float | None
    running: int
    waiting: int
    queued_prefill_tokens: int
    active_blocks: int
    total_blocks: int
    report_age_s: float


class RouteDecision(Struct, frozen=True):
    """The last decision.

    Attributes:
        policy: Who decided.
        rule: Why the first is the first.
        tokens_per_block: Of the KV caches.
        prompt_blocks: Blocks of the prompt, rounded up.
        common_blocks: Leading ones that most of the recent prompts had too; they are no reason to prefer a replica.
        num_candidates: How many there were.
        passed_over: Those that were better than the one that was asked, but had no room, as far as Ray Serve knew.
        candidates: The best of them, best first, and the one that was taken.
    """

    policy: str
    rule: str
    tokens_per_block: int
    prompt_blocks: int
    common_blocks: int
    num_candidates: int
    passed_over: list[str]
    candidates: list[Candidate]


class RouteTimes(Struct, frozen=True):
    """Where the time went, in seconds; null: not yet, or unknown.

    Attributes:
        waited_s: In the gateway, because no replica had room; 0: it did not have to.
        to_accept_s: From the gateway beginning to route to a replica accepting the sequence, that included.
        queue_s: In the engine, until its first prefill step.
        prefill_s: From there to its first token.
        decode_s: From the first to the last token.
        predicted_ttft_s: From the decision to the first token, as it was predicted.
        ttft_s: The same, as it was.
        total_s: From the gateway beginning to route to the end.
    """

    waited_s: float
    to_accept_s: float | None
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    predicted_ttft_s: float | None
    ttft_s: float | None
    total_s: float | None


class Miss(Struct, frozen=True):
    """Consecutive blocks of the prompt that had to be computed for one reason.

    Attributes:
        reason: replica_busy: another replica holds them; evicted: some replica did; salt_differs, lora_differs: they
            are held for others; diverged: up to here it was a known prompt; never_seen: new.
        first_block: Number of the first in the prompt, from 0: where the prompt begins to differ.
        num_blocks: How many.
    """

    reason: str
    first_block: int
    num_blocks: int


class RouteRecord(Struct, frozen=True):
    """The routing of one sequence.

    Attributes:
        request_id: The x-request-id of its HTTP request.
        sequence_id: Its own; the number after the last '-' is the index of the choice.
        model: Id of the model.
        tenant: Who is accountable; empty: the default tenant.
        session: A pseudonym of the session; empty: none.
        lora: LoRA adapter; empty: the base model.
        state: How far it is.
        replica: Who accepted it, or who would get it; null: nobody yet.
        attempts: Decisions that it took.
        refused: Replicas that did not take it.
        prompt_tokens: Of the prompt.
        expected_cached_tokens: Prompt tokens that the replica was believed to hold.
        cached_tokens: Those that it did reuse; null: not known yet.
        misses: Prompt blocks that had to be computed, in the order of the prompt.
        output_tokens: So far.
        finish_reason: As the engine named it; null: none.
        times: Where the time went.
        decision: How it was decided; null if Ray Serve's own router did, or nothing was decided yet.
    """

    request_id: str
    sequence_id: str
    model: str
    tenant: str
    session: str
    lora: str
    state: str
    replica: str | None
    attempts: int
    refused: list[str]
    prompt_tokens: int
    expected_cached_tokens: int
    cached_tokens: int | None
    misses: list[Miss]
    output_tokens: int
    finish_reason: str | None
    times: RouteTimes
    decision: RouteDecision | None


def make_record(trace: RouteTrace) -> RouteRecord:
    """Return what is known of a sequence now."""
    decision, prefill = trace.decision, trace.prefill
    replica_id = trace.replica_id or trace.asked_id
    return RouteRecord(
        request_id=trace.hints.request_id,
        sequence_id=trace.sequence_id,
        model=trace.model,
        tenant=trace.hints.tenant,
        session=pseudonym(trace.hints.session),
        lora=trace.lora,
        state=str(trace.state),
        replica=short_id(replica_id) or None,
        attempts=trace.attempts,
        refused=[short_id(name) for name in trace.refused],
        prompt_tokens=trace.prompt_tokens,
        expected_cached_tokens=trace.expected_tokens,
        cached_tokens=None if prefill is None else prefill.cached_tokens,
        misses=[Miss(str(span.reason), span.first_block, span.num_blocks) for span in trace.misses],
        output_tokens=trace.output_tokens,
        finish_reason=trace.finish_reason or None,
        times=_times(trace),
        decision=None if decision is None else _decision(trace, decision),
    )


def short_id(replica_id: str) -> str:
    """Return the part of a replica's full id that differs among the replicas of a deployment."""
    return replica_id.rsplit("#", 1)[-1]


def _times(trace: RouteTrace) -> RouteTimes:
    prefill = trace.prefill
    return RouteTimes(
        waited_s=trace.waited_s,
        to_accept_s=_between(trace.announced_s, trace.routed_s),
        queue_s=None if prefill is None else prefill.queue_s,
        prefill_s=None if prefill is None else prefill.prefill_s,
        decode_s=_between(trace.first_s, trace.last_s),
        predicted_ttft_s=trace.predicted_ttft_s,
        ttft_s=_between(trace.decided_s or trace.announced_s, trace.first_s),
        total_s=_between(trace.announced_s, trace.ended_s),
    )


def _between(start_s: float, end_s: float) -> float | None:
    return end_s - start_s if start_s and end_s else None


def _decision(trace: RouteTrace, decision: Decision) -> RouteDecision:
    chosen = decision.view.replica_ids.index(trace.replica_id or trace.asked_id) if trace.rank else -1
    rows = decision.order[:KEPT_CANDIDATES].tolist()
    if chosen >= 0 and chosen not in rows:
        rows.append(chosen)
    return RouteDecision(
        policy=decision.policy,
        rule=decision.rule,
        tokens_per_block=decision.view.tokens_per_block,
        prompt_blocks=decision.match.prompt_blocks,
        common_blocks=decision.match.common_blocks,
        num_candidates=trace.num_candidates,
        passed_over=[short_id(name) for name in trace.passed_over],
        candidates=[
            _candidate(decision, row, trace.rank if row == chosen else rank, chosen=row == chosen)
            for rank, row in enumerate(rows, 1)
        ],
    )


def _candidate(decision: Decision, row: int, rank: int, *, chosen: bool) -> Candidate:
    view, match, scores = decision.view, decision.match, decision.scores
    hit, host, disk = (int(column[row]) for column in (match.hit_blocks, match.host_blocks, match.disk_blocks))
    return Candidate(
        replica=short_id(view.replica_ids[row]),
        rank=rank,
        chosen=chosen,
        cost=_finite(scores.cost, row),
        terms={name: _finite(term, row) for name, term in scores.terms.items()},
        hit_blocks=HitBlocks(hit - host - disk, host, disk),
        predicted_ttft_s=None if scores.predicted_ttft_s is None else _finite(scores.predicted_ttft_s, row),
        running=int(view.running[row]),
        waiting=int(view.waiting[row]),
        queued_prefill_tokens=int(view.queued_prefill_tokens[row]),
        active_blocks=int(view.active_blocks[row]),
        total_blocks=int(view.total_blocks[row]),
        report_age_s=max(0.0, float(view.age_s[row])),
    )


def _finite(column: Column, row: int) -> float | None:
    """JSON has no infinity."""
    value = float(column[row])
    return value if math.isfinite(value) else None
