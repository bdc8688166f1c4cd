"""A compile step's context, as the runner makes it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from builders.context import StepContext, StepInput, StepName
from builders.spec import parse_spec
from serve.artifacts.node_facts import GpuFacts, NodeFacts

QUICKSTART = Path(__file__).parents[4] / "serve" / "models" / "quickstart"
H100 = GpuFacts(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=85_520_809_984)


def make_context(directory: Path, quantized: StepInput | None = None, gpus: int = 0, **spec: Any) -> StepContext:
    """Return a context below a directory."""
    output, scratch = directory / "output", directory / "scratch"
    for folder in (output, scratch):
        folder.mkdir(parents=True)
    files = {"files": sorted(path.name for path in QUICKSTART.iterdir())}
    inputs = {StepName.FETCH: StepInput("0" * 64, QUICKSTART, files)}
    if quantized is not None:
        inputs[StepName.QUANTIZE] = quantized
    return StepContext(
        spec=parse_spec({"name": "test", "kind": "tensorrt-engine", **spec}),
        inputs=inputs,
        output=output,
        scratch=scratch,
        node=NodeFacts(machine="x86_64", gpus=(H100,) * gpus, libraries={"tensorrt": "10.14.1"}),
    )


def told(context: StepContext, into: list[tuple[float, str]]) -> StepContext:
    """Return a context whose progress is written down."""
    return replace(context, progress=lambda done, total, message="": into.append((done / total, message)))
