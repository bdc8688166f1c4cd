"""Publish, the real one."""

from typing import Any

from builders.context import StepContext
from builders.steps import publish
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Write the manifest."""
    begin("publish", context)
    return publish.run(context)
