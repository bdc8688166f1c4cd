"""Compile: a cache."""

from typing import Any

from builders.context import StepContext
from serve.artifacts.manifest import CACHES
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Make a cache of the weights' names."""
    begin("compile", context)
    (context.output / CACHES).mkdir()
    names = sorted(path.name for path in context.weights.iterdir())
    (context.output / CACHES / "names.txt").write_text("\n".join(names))
    return {}
