"""A trial: one engine with one set of settings, started and measured; as values that cross a process border as JSON."""

import signal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from builders.evaluate.load_point import Goal, best_point
from builders.evaluate.out_of_memory import says_out_of_memory
from builders.tune.search import Failed, FailureKind, Measured, Outcome
from serve.artifacts.certificates import LoadPoint
from serve.core.parallel import ParallelLayout
from serve.core.strict_model import StrictModel

_FULL_BATCH = 0.9  # of it; then a larger one might do more


class TrialOrder(StrictModel):
    """What the process of a trial is to do."""

    kind: Literal["transformers", "trtllm"]
    section: dict[str, Any] = Field(description="The engine's section.")
    backend: str | None = Field(default=None, description="Of the trtllm engine, decided already.")
    model_dir: Path
    layout: ParallelLayout
    launcher: Literal["in_process", "mpi"]
    tune: dict[str, Any] = Field(description="Settings of the load.")
    first: int = Field(description="Concurrency to begin with.")
    ring: Path = Field(description="JSON list of token ids.")


class TrialResult(StrictModel):
    """What came of a trial."""

    points: tuple[LoadPoint, ...] = ()
    engine: str = Field(default="", description="Name and version.")
    start_s: float = Field(default=0.0, description="How long the engine took to start.")
    failure: FailureKind | None = None
    reason: str = ""


def outcome_of(result: TrialResult, goal: Goal, batch: int | None) -> Outcome:
    """Return what the search makes of a result.

    Args:
        result: With points, or a failure.
        goal: What requests have to meet.
        batch: Sequences that the engine computes together at most; None: unknown.
    """
    if result.failure is not None or not result.points:
        return Failed(result.failure or FailureKind.CRASHED, result.reason)
    best = best_point(result.points, goal)
    meets = goal.is_met(best)
    return Measured(
        meets=meets,
        value=best.goodput_tokens_per_s if meets else goal.nearness(best),
        error=best.relative_error,
        filled=batch is None or best.concurrency >= _FULL_BATCH * batch,
    )


def failure_of_text(text: str) -> FailureKind:
    """Tell from a message or log what kind of failure it was."""
    return FailureKind.OUT_OF_MEMORY if says_out_of_memory(text) else FailureKind.CRASHED


def failure_of_exit(code: int, log: str) -> TrialResult:
    """Return the result of a process that ended without one.

    Args:
        code: Its exit status, negative: the signal that killed it.
        log: The end of what it printed.
    """
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it printed nothing"
    if code == -signal.SIGKILL and failure_of_text(log) is FailureKind.CRASHED:
        reason = "its process was killed, most likely by the system, for the main memory that it took"
        return TrialResult(failure=FailureKind.OUT_OF_MEMORY, reason=reason)
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return TrialResult(failure=failure_of_text(log), reason=f"its process ended with {end}: {last}")
