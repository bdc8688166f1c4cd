"""Certificates: what was measured of a bundle before it was published."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.artifacts.node_facts import NodeFacts
from serve.core.strict_model import StrictModel


class Estimate(StrictModel):
    """A figure with its confidence interval."""

    value: float
    low: float = Field(description="Lower end of the interval.")
    high: float = Field(description="Upper end.")
    samples: NonNegativeInt = Field(description="What it was estimated from.")
    confidence: float = Field(default=0.95, gt=0, lt=1)


class TaskAccuracy(StrictModel):
    """Accuracy on one task, of both sides on the same questions."""

    name: str
    metric: Literal["next_token", "exact_match", "multiple_choice", "regex"] = Field(
        description="next_token: whether the likeliest token is the one that stands in the text; needs no questions."
    )
    reference: Estimate
    candidate: Estimate
    drop: Estimate = Field(description="Reference less candidate, paired; positive: the candidate is worse.")


class GateCheck(StrictModel):
    """One limit of the gate, and what was measured."""

    name: str = Field(description="What was measured: `greedy agreement`, `accuracy drop, <task>`, ...")
    measured: Estimate | None = Field(default=None, description="None: it could not be measured.")
    limit: float = Field(description="What the gate allows.")
    at_least: bool = Field(default=False, description="The limit is the least that is allowed, not the most.")
    passed: bool
    certain: bool = Field(
        default=True, description="The whole interval is on one side of the limit: another sample would tell the same."
    )
    reason: str = Field(default="", description="Why it was refused, or why it could not be measured.")
    hint: str = Field(default="", description="What would make it certain.")


class AccuracyReport(StrictModel):
    """`certificates/accuracy.json`: a candidate beside the unquantized model."""

    reference: str = Field(description="What the reference is: engine, source, precision.")
    candidate: str
    texts: NonNegativeInt = Field(default=0, description="That both were given.")
    tokens: NonNegativeInt = Field(default=0, description="Of these texts, that both predicted.")
    greedy_agreement: Estimate | None = Field(
        default=None, description="Share of greedy tokens that are the same after the same tokens."
    )
    same_outputs: Estimate | None = Field(
        default=None, description="Share of greedy continuations that are the same to their end."
    )
    kl_divergence: Estimate | None = Field(
        default=None, description="KL(reference || candidate), nats a token; a lower bound, from the likeliest tokens."
    )
    reference_perplexity: float | None = None
    candidate_perplexity: float | None = None
    perplexity_ratio: Estimate | None = Field(default=None, description="Candidate over reference.")
    tasks: tuple[TaskAccuracy, ...] = ()
    passed: bool
    reasons: tuple[str, ...] = Field(default=(), description="Why not, each with the measured and the allowed value.")
    checks: tuple[GateCheck, ...] = Field(default=(), description="What the gate looked at.")
    notes: tuple[str, ...] = Field(default=(), description="What could not be measured, or not well enough, and why.")


class LoadPoint(StrictModel):
    """A load test at one rate or concurrency."""

    concurrency: PositiveInt
    requests: PositiveInt
    seconds: NonNegativeFloat
    output_tokens_per_s: NonNegativeFloat
    goodput_tokens_per_s: NonNegativeFloat = Field(description="Output tokens of requests that met both limits.")
    ttft_p50_s: NonNegativeFloat
    ttft_p95_s: NonNegativeFloat
    tpot_p50_s: NonNegativeFloat
    tpot_p95_s: NonNegativeFloat
    within_limits: float = Field(default=0.0, ge=0, le=1, description="Share of the requests that met both limits.")
    failed: NonNegativeInt = Field(default=0, description="Requests that were refused, or did not end in time.")
    relative_error: NonNegativeFloat = Field(
        default=0.0, description="Standard error of `output_tokens_per_s`, over it, from fifths of the test."
    )


class PerformanceReport(StrictModel):
    """`certificates/performance.json`: the engine alone, without gateway and router."""

    engine: str
    node: NodeFacts = Field(description="Where it was measured.")
    prompt_tokens: PositiveInt = Field(description="Mean of the load's prompts.")
    output_tokens: PositiveInt
    ttft_limit_s: NonNegativeFloat
    tpot_limit_s: NonNegativeFloat
    percentile: PositiveFloat = Field(default=95.0, description="Of the requests that have to meet both limits.")
    points: tuple[LoadPoint, ...] = Field(min_length=1)
    best: LoadPoint = Field(
        description="Most goodput of the points at which enough requests met the limits; the nearest to that, if none."
    )


class GoldenSample(StrictModel):
    """One line of `certificates/golden.jsonl`: what the bundle's own engine generated when it was verified.

    A replica repeats some of them when it starts: an engine that loads, and then babbles, is not put to work.
    """

    prompt: tuple[NonNegativeInt, ...] = Field(min_length=1, description="Token ids.")
    tokens: tuple[NonNegativeInt, ...] = Field(description="Greedy continuation, stop token left out.")
