"""A quantize step's context, as the runner makes it, and its result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders.context import StepContext, StepInput, StepName
from builders.spec import parse_spec
from builders.steps import quantize
from serve.artifacts.node_facts import NodeFacts

QUICKSTART = Path(__file__).parents[4] / "serve" / "models" / "quickstart"
FEW = {"samples": 4, "max_tokens": 32}


@dataclass(frozen=True)
class Made:
    """What a step made.

    Attributes:
        directory: Its output.
        result: What it told.
        progress: What it told on the way.
    """

    directory: Path
    result: dict[str, Any]
    progress: list[tuple[float, float, str]] = field(default_factory=list)


def run_step(directory: Path, source: Path = QUICKSTART, **spec: Any) -> Made:
    """Quantize a checkpoint below a directory."""
    output, scratch = directory / "output", directory / "scratch"
    for folder in (output, scratch):
        folder.mkdir(parents=True)
    files = sorted(path for path in source.iterdir() if path.is_file())
    fetched = {"files": [path.name for path in files], "size_bytes": sum(path.stat().st_size for path in files)}
    told: list[tuple[float, float, str]] = []
    context = StepContext(
        spec=parse_spec({"name": "test", **spec}),
        inputs={StepName.FETCH: StepInput("0" * 64, source, fetched)},
        output=output,
        scratch=scratch,
        node=NodeFacts(machine="x86_64"),
        progress=lambda done, total, message="": told.append((done, total, message)),
    )
    return Made(output, quantize.run(context), told)
