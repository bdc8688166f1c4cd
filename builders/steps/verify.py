"""Verify: the candidate beside its reference, and whether it may be published. Makes the certificates."""

from typing import Any

from builders.context import StepContext

CODE_VERSION = 2


def run(context: StepContext) -> dict[str, Any]:
    """Measure, compare, decide; write `certificates/`. A candidate that is refused is no error here.

    Returns:
        `passed`, `reasons`, `hints`, `notes`, `golden_samples`, and `report`: the figures of `AccuracyReport`.

    Raises:
        BuildFailed: There is no candidate, or its settings exclude each other.
    """
    from builders.evaluate.verification import verify  # late: the driver imports this module for its version only

    return verify(context)
