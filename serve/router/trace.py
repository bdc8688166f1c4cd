"""RouteTrace: the way of one sequence through routing, from its announcement to its end."""

from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np

from serve.core.request import GenerateRequest, PrefillInfo
from serve.core.routing.decision import Decision
from serve.core.routing.miss_reasons import MissSpan
from serve.core.routing.request import RouteRequest, route_id
from serve.core.routing.router import Router
from serve.router.hints import RouteHints
from serve.router.prompt_hasher import HashedPrompt

KEPT_REFUSALS = 32
KEPT_CANDIDATES = 16  # of a decision among more, the best and the chosen one are remembered


class RouteState(StrEnum):
    """How far a sequence is."""

    WAITING = "waiting"  # for a replica to accept it
    ROUTED = "routed"  # accepted, no token yet
    STREAMING = "streaming"
    FINISHED = "finished"
    CANCELLED = "cancelled"  # by its client, or by a stop string that the gateway found
    FAILED = "failed"


class RouteTrace:
    """What was decided for one sequence, and what became of it. Times are `time.monotonic()`; 0: not yet.

    Attributes:
        sequence_id: Of its GenerateRequest.
        route_id: Its name in reservations and load reports.
        model: Id of its model.
        hints: What its HTTP request said.
        prompt_tokens, max_tokens: Its sizes; `max_tokens` includes limits that the client did not name.
        lora: LoRA adapter; empty: the base model.
        announced_s: When it came to be routed.
        route: What was routed; None before the first decision, and after the end.
        router: What decided; another one may have taken its place since.
        decision: The last one; None if Ray Serve's own router decides.
        num_candidates: How many it had.
        asked_id: Who was to be asked; empty: nobody yet.
        passed_over: Better ones that had no room, as far as Ray Serve knew.
        decided_s: When that was.
        attempts: Decisions so far.
        refused: Replicas that did not take it, in order, as far as there are `KEPT_REFUSALS`; one may occur twice.
        avoided: Replicas that have not taken it since it went round the last time.
        expected_tokens: Prompt tokens that the chosen replica was believed to hold.
        predicted_ttft_s: Of the chosen replica; None if the policy predicts none.
        replica_id: Who accepted it; empty: nobody yet.
        rank: 1 if that was the first choice; 0: not among the candidates.
        routed_s: When that was.
        prefill: What the engine said about its prompt.
        first_s, last_s: When its first token came, and its last so far.
        ended_s: When it ended.
        state: How far it is.
        output_tokens: Tokens that came.
        output: The tokens themselves, if they will be hashed for the request log.
        finish_reason: As the engine named it; empty: none.
        prompt: The prompt in blocks; None before the first decision, and after the end.
        waited_s: How long it waited in the gateway, because no replica had room.
        misses: Why blocks of it have to be computed; empty before it is accepted.
    """

    __slots__ = (
        "announced_s",
        "asked_id",
        "attempts",
        "avoided",
        "decided_s",
        "decision",
        "ended_s",
        "expected_tokens",
        "finish_reason",
        "first_s",
        "hints",
        "last_s",
        "lora",
        "max_tokens",
        "misses",
        "model",
        "num_candidates",
        "output",
        "output_tokens",
        "passed_over",
        "predicted_ttft_s",
        "prefill",
        "prompt",
        "prompt_tokens",
        "rank",
        "refused",
        "replica_id",
        "route",
        "route_id",
        "routed_s",
        "router",
        "sequence_id",
        "state",
        "waited_s",
    )

    def __init__(self, request: GenerateRequest, hints: RouteHints, now_s: float) -> None:
        self.sequence_id = request.request_id
        self.route_id = route_id(request.request_id)
        self.model = request.model
        self.hints = hints
        self.prompt_tokens = request.prompt_tokens
        self.max_tokens = request.sampling.max_tokens
        self.lora = request.lora
        self.announced_s = now_s
        self.waited_s = 0.0
        self.route: RouteRequest | None = None
        self.router: Router | None = None
        self.decision: Decision | None = None
        self.num_candidates = 0
        self.asked_id = ""
        self.passed_over: tuple[str, ...] = ()
        self.decided_s = 0.0
        self.attempts = 0
        self.refused: list[str] = []
        self.avoided: frozenset[str] = frozenset()
        self.expected_tokens = 0
        self.predicted_ttft_s: float | None = None
        self.replica_id = ""
        self.rank = 0
        self.routed_s = 0.0
        self.prefill: PrefillInfo | None = None
        self.first_s = self.last_s = self.ended_s = 0.0
        self.state = RouteState.WAITING
        self.output_tokens = 0
        self.output: list[int] | None = None
        self.finish_reason = ""
        self.prompt: HashedPrompt | None = None
        self.misses: tuple[MissSpan, ...] = ()

    def was_refused(self, replica_id: str) -> None:
        """Note that a replica did not take it."""
        self.avoided |= {replica_id}
        if len(self.refused) < KEPT_REFUSALS:
            self.refused.append(replica_id)

    def decided(
        self, router: Router, decision: Decision, now_s: float, asked_id: str, passed_over: tuple[str, ...] = ()
    ) -> None:
        """Note a decision, and which of the candidates will be asked."""
        self.router, self.decision, self.decided_s = router, decision, now_s
        self.asked_id, self.passed_over = asked_id, passed_over[:KEPT_CANDIDATES]
        self.num_candidates = len(decision.view)
        self.attempts += 1
        self._expect(decision, decision.view.replica_ids.index(asked_id))

    def accepted(self, replica_id: str, now_s: float) -> None:
        """Note who has it."""
        self.replica_id, self.routed_s = replica_id, now_s
        if self.state is RouteState.WAITING:  # the first token may be faster than the news of this
            self.state = RouteState.ROUTED
        if self.decision is not None:
            ids = self.decision.view.replica_ids
            number = ids.index(replica_id) if replica_id in ids else -1
            self._expect(self.decision, number)
            self.decision = shorten(self.decision, number)

    def forget_prompt(self) -> None:
        """Let go what is large, and what decided; a record needs neither."""
        self.route = self.router = self.prompt = None

    def _expect(self, decision: Decision, number: int) -> None:
        """Note what is expected of a candidate; -1: of a replica that was none."""
        self.rank, self.expected_tokens, self.predicted_ttft_s = 0, 0, None
        if number >= 0:
            self.rank = _rank(decision, number)
            self.expected_tokens = int(decision.match.hit_blocks[number]) * decision.view.tokens_per_block
            predicted = decision.scores.predicted_ttft_s
            self.predicted_ttft_s = None if predicted is None else float(predicted[number])


def _rank(decision: Decision, number: int) -> int:
    if number == decision.order[0]:
        return 1
    order = decision.order.tolist()
    return order.index(number) + 1 if number in order else len(order) + 1


def shorten(decision: Decision, chosen: int, kept: int = KEPT_CANDIDATES) -> Decision:
    """Return the decision with its best candidates only, and the chosen one: a thousand of them are 200 KiB."""
    view = decision.view
    if len(view) <= kept:
        return decision
    rows = decision.order[:kept]
    if chosen >= 0 and chosen not in rows:
        rows = np.append(rows[:-1], chosen)
    columns: dict[str, Any] = {
        name: value[rows]
        for name in type(view).__dataclass_fields__
        if isinstance(value := getattr(view, name), np.ndarray)
    }
    match, scores = decision.match, decision.scores
    predicted = scores.predicted_ttft_s
    return replace(
        decision,
        order=np.arange(len(rows)),
        view=replace(view, replica_ids=tuple(view.replica_ids[row] for row in rows.tolist()), **columns),
        match=replace(
            match,
            hit_blocks=match.hit_blocks[rows],
            host_blocks=match.host_blocks[rows],
            disk_blocks=match.disk_blocks[rows],
        ),
        scores=replace(
            scores,
            cost=scores.cost[rows],
            terms={name: term[rows] for name, term in scores.terms.items()},
            predicted_ttft_s=None if predicted is None else predicted[rows],
        ),
    )
