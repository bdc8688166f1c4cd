"""What `raytrt build --dry-run` prints: the steps of a build, for people, and as JSON for machines."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from builders.display import duration
from builders.graph import StepState
from builders.making import BuildOutline
from builders.reports import print_line
from builders.resources import without_labels
from serve.core.resources import add_all, describe

_STATES = {StepState.RUN: "to run", StepState.CACHED: "done", StepState.NOT_NEEDED: "not needed"}


def outline_to_json(outline: BuildOutline) -> dict[str, Any]:
    """Return what a build would do for machines."""
    return {
        "fingerprint": outline.graph.fingerprint,
        "refused": outline.refused,
        "steps": [
            {
                "step": step.name.value,
                "state": outline.states[step.name].value,
                "fingerprint": step.fingerprint,
                "needs": [need.value for need in step.needs],
                "resources": [dict(bundle) for bundle in step.resources.bundles],
                "engine_env": step.resources.engine_env,
                "seconds": outline.seconds.get(step.name),
            }
            for step in outline.graph.steps
        ],
    }


def print_outline(console: Console, outline: BuildOutline) -> None:
    """Show what a build would do as a table."""
    table = Table("step", "state", "took", "reserves", "fingerprint", box=None, pad_edge=False)
    for step in outline.graph.steps:
        seconds = outline.seconds.get(step.name)
        where = f"{describe(without_labels(add_all(step.resources.bundles)))}"
        table.add_row(
            step.name.value,
            _STATES[outline.states[step.name]],
            "" if seconds is None else duration(seconds),
            escape(where + (", in engine_env" if step.resources.engine_env else "")),
            step.fingerprint[:12],
        )
    console.print(table)
    print_line(console, f"bundle {outline.graph.fingerprint[:12]}")
    if outline.refused is not None:
        print_line(console, f"The gate refused this candidate at {outline.refused}; --retry verifies it again")
