"""docs/worker-groups.md's state diagram, from the table of transitions: `python -m tools.group_diagram`."""

from pathlib import Path

from serve.core.group_state import TRANSITIONS, GroupState, Steps

DOCUMENT = Path(__file__).parents[1] / "docs" / "worker-groups.md"
_BEGIN, _END = "```mermaid\n", "```\n"


def draw() -> str:
    """Return the diagram, as Mermaid has it."""
    arrows: dict[tuple[GroupState, GroupState, Steps], list[str]] = {}
    for (before, event), (after, steps) in TRANSITIONS.items():
        arrows.setdefault((before, after, steps), []).append(event.__name__)
    lines = ["stateDiagram-v2", f"    [*] --> {GroupState.STARTING}"]
    for (before, after, steps), events in arrows.items():
        what = f" / {steps.value}" if steps.value else ""
        lines.append(f"    {before} --> {after}: {', '.join(events)}{what}")
    return "\n".join([*lines, f"    {GroupState.STOPPED} --> [*]", ""])


def insert(text: str) -> str:
    """Return the document with the present diagram in the place of the one it has."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + begin + draw() + end + after


if __name__ == "__main__":
    DOCUMENT.write_text(insert(DOCUMENT.read_text()))
