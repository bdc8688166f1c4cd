"""StepContext: what a step is given. A step is a function of it, and knows neither Ray nor the store."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from builders.spec import BuildSpec
from serve.artifacts.node_facts import NodeFacts


class StepName(StrEnum):
    """The steps of a build, in order; not every build has all of them."""

    FETCH = "fetch"
    REFERENCE = "reference"
    QUANTIZE = "quantize"
    COMPILE = "compile"  # tensorrt-engine: build engines; else: prepare
    TUNE = "tune"
    VERIFY = "verify"
    PUBLISH = "publish"


class StepProgress(Protocol):
    """Where a step tells how far it is. Cheap: call it as often as you like, from any thread."""

    def __call__(self, done: float, total: float, message: str = "") -> None:
        """Tell that `done` of `total` (bytes, samples, trials, ...) are done, and what is being done."""


def no_step_progress(done: float, total: float, message: str = "") -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class StepInput:
    """What an earlier step made.

    Attributes:
        fingerprint: Of it.
        directory: Its files on this node, read-only. Of `fetch`: the source checkpoint, wherever it lies.
        result: What it told.
        seconds: How long it took.
    """

    fingerprint: str
    directory: Path
    result: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class StepContext:
    """What a step is given.

    Attributes:
        spec: Of the build.
        inputs: Of the steps that it needs.
        output: An empty directory. What is in it when the step returns is its output; no symbolic links.
        scratch: Another empty directory, removed afterwards.
        node: Where the step runs.
        candidate: For tune and verify: a bundle's directory as it would be published (`model/`, `tokenizer/`,
            `runtime.json`, `caches/`), read-only. Of every other step None.
        user_files: The files that the specification names (calibration texts, tasks), as its texts name them, and where
            they are on this node.
        progress: Where to tell how far it is.
    """

    spec: BuildSpec
    inputs: Mapping[StepName, StepInput]
    output: Path
    scratch: Path
    node: NodeFacts
    candidate: Path | None = None
    user_files: Mapping[str, Path] = field(default_factory=dict)
    progress: StepProgress = no_step_progress

    @property
    def checkpoint(self) -> Path:
        """The source checkpoint."""
        return self.inputs[StepName.FETCH].directory

    @property
    def weights(self) -> Path:
        """The checkpoint to go on with: quantized, if the build quantizes."""
        return self.inputs[StepName.QUANTIZE if StepName.QUANTIZE in self.inputs else StepName.FETCH].directory


class Step(Protocol):
    """A step: `builders.steps.<name>.run`.

    The result is JSON; it is kept, shown, and handed to later steps. A step runs in a process of its own, and may use
    the GPUs that it sees; an exception other than `BuildFailed` or `ConfigError` is taken for an accident, and the step
    is tried again.
    """

    def __call__(self, context: StepContext) -> dict[str, Any]:
        """Do the work."""
