"""`tuning.json`: the whole search. Every trial with its settings, figures and verdict."""

from typing import Any

from pydantic import Field

from builders.tune.search import FailureKind
from serve.artifacts.certificates import LoadPoint
from serve.core.strict_model import StrictModel


class TrialRecord(StrictModel):
    """One trial."""

    number: int
    settings: dict[str, Any] = Field(description="Values of the knobs.")
    failure: FailureKind | None = None
    reason: str = Field(default="", description="Why it failed.")
    meets: bool = Field(default=False, description="At some load enough requests met the goal.")
    goodput_tokens_per_s: float = Field(default=0.0, description="At the best load.")
    nearness: float = Field(default=0.0, description="Limits over what was measured, at most 1, at the best load.")
    concurrency: int = Field(default=0, description="The best load.")
    points: tuple[LoadPoint, ...] = ()
    start_s: float = Field(default=0.0, description="How long the engine took to start.")
    seconds: float = Field(default=0.0, description="How long the trial took.")
    verdict: str = Field(default="", description="baseline, chosen, or nothing.")


class TuningRecord(StrictModel):
    """The search."""

    format_version: int = 1
    search: str
    prompt_tokens: int
    output_tokens: int
    ttft_limit_s: float
    tpot_limit_s: float
    percentile: float
    knobs: dict[str, list[Any]] = Field(description="Values that were searched.")
    trials: tuple[TrialRecord, ...]
    chosen: dict[str, Any] = Field(description="Values of the knobs that were chosen.")
    why: str = Field(description="Why the search ended.")
    seconds: float
