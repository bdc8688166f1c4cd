"""Reference: what the unquantized model makes of the texts and questions. What a candidate is compared with."""

from typing import Any

from builders.context import StepContext

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Record the reference.

    Returns:
        `model`: what it is, for people; `texts`, `questions`: how many; `notes`.

    Raises:
        ConfigError: Texts or questions have a mistake, or the model's engine does not take them.
        BuildFailed: The model computes no finite numbers.
    """
    from builders.evaluate.reference_run import record_reference  # late: the driver imports this for its version only

    return record_reference(context)
