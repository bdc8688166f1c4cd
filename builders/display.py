"""What a build shows while it runs: a line for each step, with a bar where there is a terminal."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from builders.context import StepName
from builders.progress import Progress

StepEnd = Literal["done", "cached", "failed", "refused"]
_LINE_EVERY_S = 15.0  # of progress, where lines cannot be overwritten
_MARKS = {
    "pending": "[dim]·[/]",
    "working": "[cyan]▸[/]",
    "done": "[green]✓[/]",
    "cached": "[dim green]✓[/]",
    "failed": "[red]✗[/]",
    "refused": "[red]✗[/]",
}


class BuildDisplay(Protocol):
    """Where a build tells what it does. A context manager, entered before the first call; nothing in it blocks."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def reading(self, progress: Progress) -> None:
        """The source is read, before there are steps."""

    def plan(self, steps: Sequence[StepName]) -> None:
        """Show these steps, none of which has begun."""

    def working(self, step: StepName, what: str) -> None:
        """A step waits for something, or is at something."""

    def progress(self, step: StepName, progress: Progress) -> None:
        """A step is so far."""

    def ended(self, step: StepName, end: StepEnd, what: str = "") -> None:
        """A step has ended."""


def make_display(console: Console, *, quiet: bool = False) -> BuildDisplay:
    """Make the display that suits where the output goes."""
    if quiet:
        return NoDisplay()
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class NoDisplay:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """Show nothing."""

    def reading(self, progress: Progress) -> None:
        """Show nothing."""

    def plan(self, steps: Sequence[StepName]) -> None:
        """Show nothing."""

    def working(self, step: StepName, what: str) -> None:
        """Show nothing."""

    def progress(self, step: StepName, progress: Progress) -> None:
        """Show nothing."""

    def ended(self, step: StepName, end: StepEnd, what: str = "") -> None:
        """Show nothing."""


class LineDisplay:
    """For logs: a line a change.

    Args:
        console: Where it goes.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[StepName, str] = {}
        self._told_s: dict[StepName, float] = {}
        self._seen: dict[StepName, Progress] = {}
        self._ended: set[StepName] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """Print it."""
        self._console.print(f"raytrt: {text}", markup=False, highlight=False, soft_wrap=True)

    def reading(self, progress: Progress) -> None:
        """Print it now and then."""
        self.progress(StepName.FETCH, progress)

    def plan(self, steps: Sequence[StepName]) -> None:
        """Say which there are."""
        self.say(f"steps: {', '.join(step.value for step in steps)}")

    def working(self, step: StepName, what: str) -> None:
        """Print what is new."""
        self._ended.discard(step)
        if self._last.get(step) != what:
            self._last[step] = what
            self._told_s[step] = time.monotonic()
            self.say(f"{step.value}: {what}")

    def progress(self, step: StepName, progress: Progress) -> None:
        """Print it now and then, if it is new."""
        now_s = time.monotonic()
        told_s = self._told_s.setdefault(step, now_s)
        if step not in self._ended and now_s - told_s >= _LINE_EVERY_S and self._seen.get(step) != progress:
            self._told_s[step] = now_s
            self._seen[step] = progress
            self.say(f"{step.value}: {percent(progress)} {progress.message}".rstrip())

    def ended(self, step: StepName, end: StepEnd, what: str = "") -> None:
        """Print it."""
        self._ended.add(step)
        self.say(f"{step.value}: {end}{f' ({what})' if what else ''}")


@dataclass(frozen=True)
class _Row:
    """What is shown of a step."""

    state: str = "pending"
    text: str = ""
    began_s: float | None = None
    ended_s: float | None = None
    progress: Progress | None = None
    progress_s: float = 0.0  # when the first progress came: what is left is judged from there
    seen: Progress | None = None  # the last one, which is told again and again, also after what it was of has ended


class LiveDisplay:
    """For terminals: a table that is drawn anew.

    Args:
        console: Where it goes.
    """

    def __init__(self, console: Console) -> None:
        self._rows: dict[StepName, _Row] = {}
        self._lock = threading.Lock()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=5, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print it above the table."""
        self._live.console.print(escape(text), highlight=False)

    def reading(self, progress: Progress) -> None:
        """Show it as what fetch does."""
        if StepName.FETCH not in self._rows:
            self.working(StepName.FETCH, progress.message)
        self.progress(StepName.FETCH, progress)

    def plan(self, steps: Sequence[StepName]) -> None:
        """Show them."""
        with self._lock:
            self._rows = {step: _Row() for step in steps}

    def working(self, step: StepName, what: str) -> None:
        """Show it."""
        with self._lock:
            row = self._rows.get(step, _Row())
            began_s = row.began_s if row.began_s is not None else time.monotonic()
            self._rows[step] = replace(row, state="working", text=what, began_s=began_s, progress=None)

    def progress(self, step: StepName, progress: Progress) -> None:
        """Show it."""
        with self._lock:
            row = self._rows.get(step, _Row())
            if row.state == "working" and progress != row.seen:
                began_s = row.progress_s if row.progress is not None else time.monotonic()
                self._rows[step] = replace(
                    row, text=progress.message, progress=progress, seen=progress, progress_s=began_s
                )

    def ended(self, step: StepName, end: StepEnd, what: str = "") -> None:
        """Show it."""
        with self._lock:
            row = self._rows.get(step, _Row())
            ended_s = time.monotonic() if row.began_s is not None else None
            self._rows[step] = replace(row, state=end, text=what or end, ended_s=ended_s, progress=None)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        now_s = time.monotonic()
        with self._lock:
            rows = dict(self._rows)
        for step, row in rows.items():
            elapsed = "" if row.began_s is None else duration((row.ended_s or now_s) - row.began_s)
            bar: ProgressBar | str = ""
            left = ""
            if row.progress is not None and row.progress.total > 0:
                bar = ProgressBar(
                    total=row.progress.total, completed=min(row.progress.done, row.progress.total), width=24
                )
                left = remaining(row.progress, now_s - row.progress_s)
            table.add_row(_MARKS[row.state], step.value, bar, elapsed, left, escape(row.text))
        return table


def percent(progress: Progress) -> str:
    """Return how much is done."""
    return f"{100 * min(1.0, progress.done / progress.total):.0f} %" if progress.total > 0 else ""


def remaining(progress: Progress, elapsed_s: float) -> str:
    """Return how long it will go on, if it goes on like this; empty as long as nobody can tell."""
    share = progress.done / progress.total if progress.total > 0 else 0.0
    if not 0.02 < share < 1 or elapsed_s < 2:
        return ""
    return f"{duration(elapsed_s * (1 - share) / share)} left"


def duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
