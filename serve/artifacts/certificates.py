"""Certificates: what was measured of a bundle before it was published."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

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
    metric: Literal["exact_match", "multiple_choice", "regex"]
    reference: Estimate
    candidate: Estimate
    drop: Estimate = Field(description="Reference less candidate, paired; positive: the candidate is worse.")


class AccuracyReport(StrictModel):
    """`certificates/accuracy.json`: a candidate beside the unquantized model."""

    reference: str = Field(description="What the reference is: engine, source, precision.")
    candidate: str
    greedy_agreement: Estimate | None = Field(default=None, description="Share of greedy tokens that are the same.")
    kl_divergence: Estimate | None = Field(default=None, description="KL(reference || candidate), nats a token.")
    reference_perplexity: float | None = None
    candidate_perplexity: float | None = None
    tasks: tuple[TaskAccuracy, ...] = ()
    passed: bool
    reasons: tuple[str, ...] = Field(default=(), description="Why not, each with the measured and the allowed value.")


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


class PerformanceReport(StrictModel):
    """`certificates/performance.json`: the engine alone, without gateway and router."""

    engine: str
    node: NodeFacts = Field(description="Where it was measured.")
    prompt_tokens: PositiveInt = Field(description="Mean of the load's prompts.")
    output_tokens: PositiveInt
    ttft_limit_s: NonNegativeFloat
    tpot_limit_s: NonNegativeFloat
    points: tuple[LoadPoint, ...] = Field(min_length=1)
    best: LoadPoint


class GoldenSample(StrictModel):
    """One line of `certificates/golden.jsonl`: what the bundle's own engine generated when it was verified.

    A replica repeats some of them when it starts: an engine that loads, and then babbles, is not put to work.
    """

    prompt: tuple[NonNegativeInt, ...] = Field(min_length=1, description="Token ids.")
    tokens: tuple[NonNegativeInt, ...] = Field(description="Greedy continuation, stop token left out.")
