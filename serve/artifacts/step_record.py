"""StepRecord: what one step of a build made, kept in the store so that no build makes it again."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from serve.artifacts.manifest import FileEntry, check_paths
from serve.core.strict_model import StrictModel


class StepRecord(StrictModel):
    """One finished step. Its fingerprint covers all that the output depends on."""

    format_version: Literal[1] = 1
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    step: str = Field(description="Name of the step.")
    result: dict[str, Any] = Field(default={}, description="What the step told, besides its files.")
    files: tuple[FileEntry, ...] = Field(default=(), description="Its output, ordered by path.")
    seconds: NonNegativeFloat = Field(default=0.0, description="How long it took.")
    created: str = Field(description="ISO 8601, UTC.")
    node: str = Field(default="", description="Name of the host it ran on.")

    @model_validator(mode="after")
    def _paths_are_good(self) -> Self:
        check_paths(self.files)
        return self
