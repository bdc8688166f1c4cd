"""What tests tell stand-in steps, through a directory that all processes of a test see.

journal            a line for each beginning of a step: its name and its process
hold-<step>        while it is there, the step waits after its beginning
fail-<step>        the step raises what the file says: `accident`, `failed`, `mistake`; an accident once only
verdict            reasons of the gate, one a line; without it, the candidate passes
"""

import os
import time
from pathlib import Path

from builders.context import StepContext
from builders.errors import BuildFailed
from serve.errors import ConfigError

VARIABLE = "RAYTRT_TEST_STEPS"
ENVIRONMENT_VARIABLE = "RAYTRT_TEST_ENVIRONMENT"  # set in the engine's environment


def begin(step: str, context: StepContext) -> None:
    """Write the journal, then do what the test wants."""
    place = Path(os.environ[VARIABLE])
    with (place / "journal").open("a") as journal:
        journal.write(f"{step} {os.getpid()}\n")
    print(f"this is {step}, for {context.spec.name}")
    while (place / f"hold-{step}").exists():
        context.progress(1, 2, "held")
        time.sleep(0.02)
    orders = place / f"fail-{step}"
    if orders.exists():
        first, _, rest = orders.read_text().partition("\n")
        orders.write_text(rest)
        _end(step, first)


def _end(step: str, how: str) -> None:
    match how:
        case "accident":
            raise OSError("the disk was away")
        case "failed":
            raise BuildFailed(step, "it cannot be done")
        case "mistake":
            raise ConfigError("compile.max_batch_size: 7 is odd; use an even number")


def reasons() -> list[str]:
    """Return why the gate refuses."""
    verdict = Path(os.environ[VARIABLE], "verdict")
    return verdict.read_text().splitlines() if verdict.exists() else []
