"""Verify: as the test wants it."""

import json
from typing import Any

from builders.context import StepContext
from serve.artifacts.certificates import AccuracyReport
from serve.artifacts.manifest import ACCURACY, CERTIFICATES, RUNTIME
from tests.integration.stand_in_steps.behaviour import begin, reasons

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Pass, or refuse."""
    begin("verify", context)
    assert context.candidate is not None
    assert json.loads((context.candidate / RUNTIME).read_bytes())["replica_requests"] == 5
    (context.output / CERTIFICATES).mkdir()
    why = tuple(reasons())
    report = AccuracyReport(reference="a", candidate="b", passed=not why, reasons=why)
    (context.output / ACCURACY).write_text(report.model_dump_json())
    return {"passed": not why, "reasons": list(why)}
