"""Fetch, the real one."""

from typing import Any

from builders.context import StepContext
from builders.steps import fetch
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Fetch."""
    begin("fetch", context)
    return fetch.run(context)
