"""Report: figures of one benchmark run, as a table for people and one JSON line each for machines."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: What it is.
        value, unit: The measurement.
        hold: What it has to hold, for instance `<= 4`; empty for a figure that only informs.
    """

    name: str
    value: float
    unit: str
    hold: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the value holds; None if there is nothing to hold."""
        if not self.hold:
            return None
        relation, bound = self.hold.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


@dataclass
class Report:
    """Collects figures and notes; prints them, and keeps the output in benchmarks/results.

    Attributes:
        name: Stem of the file.
        command: How to repeat the run.
    """

    name: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, hold: str = "") -> None:
        """Add a figure, and print it as progress."""
        self.figures.append(Figure(name, value, unit, hold))
        print(f"  {name}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Add a sentence below the table."""
        self.notes.append(text)

    def text(self) -> str:
        """Return the whole output."""
        rows = [
            (f.name, f"{f.value:.4g}", f.unit, f.hold, {True: "yes", False: "NO", None: ""}[f.ok]) for f in self.figures
        ]
        rows.insert(0, ("figure", "value", "unit", "hold", "ok"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [f"$ {self.command}", machine(), ""]
        for number, row in enumerate(rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            if number == 0:
                lines.append("  ".join("-" * width for width in widths))
        lines += ["", *self.notes, ""]
        lines += [json.dumps({**asdict(f), "value": float(f"{f.value:.6g}"), "ok": f.ok}) for f in self.figures]
        return "\n".join(lines) + "\n"

    def finish(self) -> None:
        """Print everything and write benchmarks/results/NAME.txt."""
        text = self.text()
        print(text)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.txt").write_text(text)


def machine() -> str:
    """Describe where this runs, in one line."""
    found = {name: _version(name) for name in ("ray", "raytrt")}
    packages = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {python}, {packages}; client on the same cores"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its folder, on a machine that has little else
        return None


def percentile(values: list[float], fraction: float) -> float:
    """Return the value below which `fraction` of `values` lie (nearest rank)."""
    return sorted(values)[min(len(values) - 1, int(len(values) * fraction))]
