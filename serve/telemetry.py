"""Every metric: name, unit, labels, buckets, in one table. What records them is made where they are recorded."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: In Prometheus' form: the unit ends it, and `_total` a counter.
        kind: A counter only grows; a gauge is a present value; a histogram counts values by size.
        help: What it says, for people.
        labels: What it is split by.
        buckets: Upper bounds of a histogram, ascending, in its unit; +Inf follows.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
)
_REQUEST_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_MODEL = ("model",)

REQUESTS = Metric(
    "raytrt_requests_total",
    "counter",
    "Requests answered. Status 499: the client went away. An error in mid-stream counts as its own status.",
    ("model", "endpoint", "status"),
)
REQUESTS_IN_FLIGHT = Metric("raytrt_requests_in_flight", "gauge", "Requests being answered now, of any endpoint.")
SEQUENCES_IN_FLIGHT = Metric(
    "raytrt_sequences_in_flight", "gauge", "Sequences being generated, or waiting for their first token.", _MODEL
)
SEQUENCES_WAITING = Metric("raytrt_sequences_waiting", "gauge", "Sequences without a first token yet.", _MODEL)
TTFT = Metric(
    "raytrt_ttft_seconds", "histogram", "Request reaching the gateway to first token leaving.", _MODEL, _TTFT_S
)
ITL = Metric(
    "raytrt_itl_seconds", "histogram", "Gap between tokens; of tokens that come together, their mean.", _MODEL, _TOKEN_S
)
TPOT = Metric(
    "raytrt_tpot_seconds", "histogram", "(End to end - TTFT) / (output tokens - 1), one a sequence.", _MODEL, _TOKEN_S
)
E2E = Metric(
    "raytrt_e2e_seconds", "histogram", "Request reaching the gateway to last token leaving.", _MODEL, _REQUEST_S
)
QUEUE = Metric(
    "raytrt_queue_seconds", "histogram", "Engine taking a sequence to its first prefill step.", _MODEL, _TTFT_S
)
PREFILL = Metric("raytrt_prefill_seconds", "histogram", "First prefill step to first token.", _MODEL, _TTFT_S)
PROMPT_TOKENS = Metric("raytrt_prompt_tokens_total", "counter", "Prompt tokens, each prompt once.", _MODEL)
CACHED_TOKENS = Metric(
    "raytrt_cached_prompt_tokens_total", "counter", "Prompt tokens whose KV blocks were reused.", _MODEL
)
COMPLETION_TOKENS = Metric("raytrt_completion_tokens_total", "counter", "Tokens generated.", _MODEL)

FALLBACK = Metric(
    "raytrt_fallback_active",
    "gauge",
    "1 if a replica of the model is not served by what was configured, but by its fallback or an earlier bundle.",
    _MODEL,
)

ROUTING_DECISIONS = Metric(
    "raytrt_routing_decisions_total",
    "counter",
    "Routing decisions, by the policy and the rule that decided. A sequence that was refused, or that waits for room, "
    "needs several.",
    ("model", "policy", "rule"),
)
ROUTING_REFUSALS = Metric(
    "raytrt_routing_refusals_total", "counter", "Chosen replicas that did not take a sequence.", _MODEL
)
ROUTING_DECISION = Metric(
    "raytrt_routing_decision_seconds",
    "histogram",
    "Time that a routing decision took: hashing, matching and scoring.",
    _MODEL,
    (2.5e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2.5e-2, 0.1),
)
ROUTING_PROMPT_TOKENS = Metric(
    "raytrt_routing_prompt_tokens_total", "counter", "Prompt tokens of all sequences with a first token.", _MODEL
)
ROUTING_EXPECTED_TOKENS = Metric(
    "raytrt_routing_expected_cached_tokens_total",
    "counter",
    "Those of them that the chosen replica was believed to hold.",
    _MODEL,
)
ROUTING_CACHED_TOKENS = Metric(
    "raytrt_routing_cached_tokens_total", "counter", "Those of them that the replica did reuse.", _MODEL
)
ROUTING_MISSED_BLOCKS = Metric(
    "raytrt_routing_missed_blocks_total",
    "counter",
    "Prompt blocks that had to be computed, by tenant (the busiest; the others are `other`) and reason.",
    ("model", "tenant", "reason"),
)
ROUTING_TTFT_RATIO = Metric(
    "raytrt_routing_ttft_prediction_ratio",
    "histogram",
    "Predicted over real time from a routing decision to the first token: 1 is right, 2 twice too long.",
    _MODEL,
    (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0),
)
ROUTING_QUEUED = Metric(
    "raytrt_routing_queued_sequences",
    "gauge",
    "Sequences that wait in this gateway because no replica has room, by tenant (the busiest; others are `other`).",
    ("model", "tenant"),
)
ROUTING_QUEUE_WAIT = Metric(
    "raytrt_routing_queue_wait_seconds",
    "histogram",
    "How long sequences waited in this gateway for room, of those that had to and were served.",
    _MODEL,
    _REQUEST_S,
)
ROUTING_TURNED_AWAY = Metric(
    "raytrt_routing_turned_away_total",
    "counter",
    "Sequences refused because too many waited already (full), or that waited too long (too_long).",
    ("model", "reason"),
)
ROUTING_INDEX_BLOCKS = Metric(
    "raytrt_routing_index_blocks", "gauge", "KV blocks that the prefix index of this gateway knows.", _MODEL
)
ROUTING_REPLICAS = Metric(
    "raytrt_routing_replicas",
    "gauge",
    "Replicas that this gateway routes to, by whether it hears what they hold and how busy they are.",
    ("model", "heard"),
)

KV_FEED_MESSAGES = Metric("raytrt_kv_feed_messages_total", "counter", "Messages heard from replicas.", _MODEL)
KV_FEED_BLOCKS = Metric(
    "raytrt_kv_feed_blocks_total", "counter", "Blocks that replicas said to be stored or removed.", _MODEL
)
KV_FEED_LOST = Metric(
    "raytrt_kv_feed_lost_messages_total", "counter", "Messages of replicas that did not arrive.", _MODEL
)
KV_FEED_SNAPSHOTS = Metric(
    "raytrt_kv_feed_snapshots_total", "counter", "Snapshots of a replica's cache that were taken in.", _MODEL
)
KV_FEED_OVERFLOWS = Metric(
    "raytrt_kv_feed_overflows_total", "counter", "How often a replica said more than could be taken in.", _MODEL
)
KV_FEED_REFUSED = Metric(
    "raytrt_kv_feed_refused_messages_total", "counter", "Messages of another release, or without sense.", _MODEL
)
EVENT_PLANE_COUNTS = {  # and the attribute of `serve.router.replica_feed.PlaneCounts` that it shows
    KV_FEED_MESSAGES: "messages",
    KV_FEED_BLOCKS: "blocks",
    KV_FEED_LOST: "lost_messages",
    KV_FEED_SNAPSHOTS: "snapshots",
    KV_FEED_OVERFLOWS: "overflows",
    KV_FEED_REFUSED: "refused",
}
REQUEST_LOG_DROPPED = Metric(
    "raytrt_request_log_dropped_total", "counter", "Lines that are missing in the request log."
)

GATEWAY_METRICS = (
    REQUESTS,
    REQUESTS_IN_FLIGHT,
    SEQUENCES_IN_FLIGHT,
    SEQUENCES_WAITING,
    TTFT,
    ITL,
    TPOT,
    E2E,
    QUEUE,
    PREFILL,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    FALLBACK,
    ROUTING_DECISIONS,
    ROUTING_REFUSALS,
    ROUTING_DECISION,
    ROUTING_PROMPT_TOKENS,
    ROUTING_EXPECTED_TOKENS,
    ROUTING_CACHED_TOKENS,
    ROUTING_MISSED_BLOCKS,
    ROUTING_TTFT_RATIO,
    ROUTING_QUEUED,
    ROUTING_QUEUE_WAIT,
    ROUTING_TURNED_AWAY,
    ROUTING_INDEX_BLOCKS,
    ROUTING_REPLICAS,
    *EVENT_PLANE_COUNTS,
    REQUEST_LOG_DROPPED,
)
