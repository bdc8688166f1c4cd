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
    "1 if a replica of the model is served by its fallback, not by the engine that was configured.",
    _MODEL,
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
)
