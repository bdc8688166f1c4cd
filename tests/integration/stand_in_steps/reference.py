"""Reference: nothing is computed."""

from typing import Any

from builders.context import StepContext
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Write which texts would be used."""
    begin("reference", context)
    (context.output / "reference.json").write_text(context.spec.verify.texts.model_dump_json())
    return {"model": "a stand-in"}
