"""Tune: the runtime settings with the most goodput under the goal, found by measured load on the real engine."""

from typing import Any

from builders.context import StepContext

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Search, and write `runtime.json`, the whole search, and if it measured enough, the performance certificate.

    Returns:
        `chosen`: values of the knobs; `trials`: how many; `why`: the end of the search; `meets`,
        `goodput_tokens_per_s`, `concurrency`: of the best load.

    Raises:
        BuildFailed: The engine does not start with any of the settings.
    """
    from builders.tune.tuning import tune  # late: the driver of a build imports this module for its version only

    return tune(context)
