"""Tune: the candidate is whole, and nothing is measured."""

from typing import Any

from builders.context import StepContext
from serve.artifacts.manifest import RUNTIME, BundleRuntime
from tests.integration.stand_in_steps.behaviour import begin

CODE_VERSION = 1


def run(context: StepContext) -> dict[str, Any]:
    """Choose a batch size."""
    begin("tune", context)
    assert context.candidate is not None
    assert (context.candidate / "model/config.json").is_file()
    assert (context.candidate / "tokenizer/tokenizer.json").is_file()
    runtime = BundleRuntime.model_validate_json((context.candidate / RUNTIME).read_bytes())
    tuned = runtime.model_copy(update={"engine": {**runtime.engine, "max_batch_size": 5}, "replica_requests": 5})
    (context.output / RUNTIME).write_text(tuned.model_dump_json())
    (context.output / "tuning.json").write_text("{}")
    return {}
