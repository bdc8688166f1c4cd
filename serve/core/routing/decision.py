"""FleetView, PrefixMatch, Scores, Decision: what a routing decision is made from, and what it is.

All of them are columns: row i of each array is the replica `view.replica_ids[i]`. Columns are numpy arrays that nobody
writes to after they were handed out, because a decision among a thousand replicas in Python objects would take longer
than the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class FleetView:
    """What is known of every candidate at one moment: last reports, plus requests routed since.

    Attributes:
        replica_ids: The candidates.
        rows: Their rows in the prefix index.
        running: Sequences in the batch.
        waiting: Sequences accepted without KV blocks, and those routed there that no report has counted yet.
        queued_prefill_tokens: Prompt tokens to compute before those of a new request.
        active_blocks: KV blocks in use, and those that requests routed there will take.
        total_blocks: KV blocks there are; 1 while unknown.
        committed_blocks: KV blocks promised to sequences until their end.
        context_tokens: Tokens whose keys and values a decode step reads.
        prefill_token_s: Learned: seconds for each prompt token computed, attention aside.
        prefill_pair_s: Learned: seconds for each (query, key) pair of a prompt's attention.
        decode_step_s: Learned: seconds of a decode step of the present batch.
        queued_token_s: Learned: seconds for each prompt token that waits, with the attention that prompts have there.
        routed_share: Requests routed there lately, relative to the mean of the candidates, and to what a replica that
            is faster than most is due; 1 everywhere is balance.
        assigned_share: Prefill work routed there lately, in time, relative to the mean.
        lasting_share: As `routed_share`, over a longer time.
        last_routed: Number of the decision that chose it last, or after which it joined.
        age_s: Since its last report.
        tokens_per_block: Of the KV cache.
        now_s: The moment.
        decisions: How many were made before.
    """

    replica_ids: tuple[str, ...]
    rows: Rows
    running: Column
    waiting: Column
    queued_prefill_tokens: Column
    active_blocks: Column
    total_blocks: Column
    committed_blocks: Column
    context_tokens: Column
    prefill_token_s: Column
    prefill_pair_s: Column
    decode_step_s: Column
    queued_token_s: Column
    routed_share: Column
    assigned_share: Column
    lasting_share: Column
    last_routed: Column
    age_s: Column
    tokens_per_block: int
    now_s: float
    decisions: int

    def __len__(self) -> int:
        return len(self.replica_ids)

    @property
    def requests(self) -> Column:
        """What each candidate has in hand: in the batch, waiting, or on the way."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """How much of a prompt each candidate holds.

    Attributes:
        hit_blocks: Leading blocks held, on whatever tier.
        host_blocks: Those of them that lie in host memory.
        disk_blocks: Those of them that lie on disk.
        prompt_blocks: Blocks of the prompt, rounded up.
        common_blocks: Leading blocks that most of the recent requests had: no reason to prefer any candidate.
    """

    hit_blocks: Column
    host_blocks: Column
    disk_blocks: Column
    prompt_blocks: int
    common_blocks: int = 0

    @property
    def credited_blocks(self) -> Column:
        """Hit blocks, where every candidate counts as if it held the common ones: those earn nobody anything."""
        return np.maximum(self.hit_blocks, float(self.common_blocks))


@dataclass(frozen=True, slots=True)
class Scores:
    """A policy's opinion.

    Attributes:
        cost: Lower is better; `inf` never.
        terms: What the cost consists of, by name, for whoever asks why.
        rule: What decided, if it was not the cost alone.
        predicted_ttft_s: Where the policy predicts it.
    """

    cost: Column
    terms: Mapping[str, Column] = field(default_factory=dict)
    rule: str = ""
    predicted_ttft_s: Column | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request should go.

    Attributes:
        order: Rows of the view, best first; some of the best, or all.
        rule: Why the first is the first.
        policy: Name of the policy.
        view, match, scores: What it was decided from.
    """

    order: Rows
    rule: str
    policy: str
    view: FleetView
    match: PrefixMatch
    scores: Scores

    @property
    def replica_id(self) -> str:
        """The first choice."""
        return self.view.replica_ids[int(self.order[0])]

    @property
    def ranked(self) -> list[str]:
        """All choices, best first."""
        return [self.view.replica_ids[row] for row in self.order.tolist()]
