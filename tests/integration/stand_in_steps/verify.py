"""Verify: as the test wants it."""

import json
import os
from typing import Any

import ray

from builders.context import StepContext
from serve.artifacts.certificates import AccuracyReport
from serve.artifacts.manifest import ACCURACY, CERTIFICATES, RUNTIME
from tests.integration.stand_in_steps.behaviour import ENVIRONMENT_VARIABLE, begin, reasons

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
    group = ray.util.get_current_placement_group()
    return {
        "passed": not why,
        "reasons": list(why),
        "bundles": group.bundle_count if group is not None else 0,
        "environment": os.environ.get(ENVIRONMENT_VARIABLE, ""),
    }
