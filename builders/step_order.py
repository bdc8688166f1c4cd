"""StepOrder: all that the tasks of one step have to know, and what they answer. Any environment reads these values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from builders.context import StepName

STEPS = "builders.steps"


@dataclass(frozen=True)
class StepOrder:
    """One step of one build.

    Attributes:
        build: Short name of the build, for logs.
        step: Which.
        fingerprint: Of its output.
        spec: The specification as the step sees it, as JSON: environments differ in their pydantic.
        environment: Hardware and library versions that the fingerprint covers; the step's node has to have them.
        store: URL of the store.
        inputs: Records of the steps that it needs, as JSON.
        user_files: Content of the files that the specification names.
        replaces: Of `publish`: why this is not what was asked for; None: it is.
        package: Of the steps' modules.
        hide_gpus: The step has reserved none, so that its process must not see any; Ray shows them.
        board: Name of the build's `ProgressBoard`.
        attempt: Of this try; names its directories, which are at one path on all nodes of a step.
    """

    build: str
    step: StepName
    fingerprint: str
    spec: Mapping[str, Any]
    environment: Mapping[str, Any]
    store: str
    inputs: Mapping[StepName, Mapping[str, Any]]
    user_files: Mapping[str, bytes] = field(default_factory=dict)
    replaces: str | None = None
    package: str = STEPS
    hide_gpus: bool = False
    board: str = ""
    attempt: str = ""


@dataclass(frozen=True)
class StagedStep:
    """What is laid out on a node for a step.

    Attributes:
        host: Name of the machine.
        root: Directory of all of it.
        output: Where the step writes.
        scratch: Where it may write, too.
        inputs: Directories of what it needs.
        candidate: A bundle's directory, or None.
        user_files: Where the user's files are.
        log: What it prints.
    """

    host: str
    root: Path
    output: Path
    scratch: Path
    inputs: Mapping[StepName, Path]
    candidate: Path | None
    user_files: Mapping[str, Path]
    log: Path


@dataclass(frozen=True)
class StepOutcome:
    """How a step's process ended.

    Attributes:
        end: done; failed: trying again will not help; mistake: nor will it, and it is the user's to mend; accident.
        result: What the step told, if it is done.
        message: What happened, if not.
        seconds: How long it took.
        tail: The last lines that it printed, if it did not succeed.
    """

    end: Literal["done", "failed", "mistake", "accident"]
    result: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0
    tail: tuple[str, ...] = ()
