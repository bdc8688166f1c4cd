"""What a build shows while it runs."""

import io
from typing import Literal

import pytest
from rich.console import Console

from builders.context import StepName
from builders.display import LineDisplay, LiveDisplay, NoDisplay, duration, make_display, percent, remaining
from builders.progress import Progress


def shown(kind: Literal["lines", "live"]) -> str:
    """A build of two steps, of which the second fails; markup in texts is no markup."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=kind == "live", width=120, color_system=None, legacy_windows=False)
    with make_display(console) as display:
        display.reading(Progress(1, 2, "reading the source"))
        display.say("checkpoint [bold]")
        display.plan([StepName.FETCH, StepName.REFERENCE, StepName.VERIFY])
        display.ended(StepName.FETCH, "cached")
        display.working(StepName.VERIFY, "waiting for 1 GPU")
        display.working(StepName.VERIFY, "waiting for 1 GPU")
        display.working(StepName.VERIFY, "running")
        display.progress(StepName.VERIFY, Progress(1, 4, "sample [1]"))
        display.ended(StepName.VERIFY, "failed", "no room [there]")
        display.progress(StepName.VERIFY, Progress(2, 4, "late"))
    return output.getvalue()


def test_lines_are_changes_and_each_is_told_once() -> None:
    assert shown("lines").splitlines() == [
        "raytrt: checkpoint [bold]",
        "raytrt: steps: fetch, reference, verify",
        "raytrt: fetch: cached",
        "raytrt: verify: waiting for 1 GPU",
        "raytrt: verify: running",
        "raytrt: verify: failed (no room [there])",
    ]


def test_a_word_of_before_does_not_hide_what_a_step_does_now() -> None:
    output = io.StringIO()
    with make_display(Console(file=output, force_terminal=True, width=120, color_system=None)) as display:
        display.plan([StepName.TUNE])
        for what in ("running", "its process ended; try 2 of 3"):
            display.working(StepName.TUNE, what)
            display.progress(StepName.TUNE, Progress(9, 10, "trial 9"))
    assert "try 2 of 3" in [line for line in output.getvalue().splitlines() if "tune" in line][-1]


def test_a_terminal_shows_a_line_a_step() -> None:
    last = shown("live").split("checkpoint [bold]")[-1]
    for text in ("✓ fetch", "· reference", "✗ verify", "no room [there]"):
        assert text in last
    assert "late" not in last


def test_the_display_fits_where_it_goes() -> None:
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True)), LiveDisplay)
    assert isinstance(make_display(Console(file=io.StringIO())), LineDisplay)
    assert isinstance(make_display(Console(), quiet=True), NoDisplay)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (12.4, "12 s"), (59.9, "60 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (7322, "2 h 02 min")],
)
def test_a_time_is_told_in_its_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_left_is_told_once_it_can_be() -> None:
    assert remaining(Progress(25, 100), 10.0) == "30 s left"
    assert remaining(Progress(1, 100), 10.0) == ""
    assert remaining(Progress(50, 100), 1.0) == ""
    assert remaining(Progress(5, 0), 10.0) == ""
    assert percent(Progress(150, 100)) == "100 %"
