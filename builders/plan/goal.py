"""Goal: what a service has to do, by flags or as a file. PURE."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from serve.core.strict_model import StrictModel, describe_mistakes
from serve.errors import ConfigError
from serve.yaml_file import read_yaml


class Objective(StrEnum):
    """What the best plan has the most, or the least, of."""

    FEWEST_GPUS = "fewest_gpus"
    LOWEST_COST = "lowest_cost"
    LOWEST_LATENCY = "lowest_latency"
    MAX_TOKENS_PER_GPU_HOUR = "max_tokens_per_gpu_hour"


class Goal(StrictModel):
    """What the service has to do."""

    model_config = ConfigDict(allow_inf_nan=False)

    objective: Objective | None = Field(
        default=None,
        description="None: fewest_gpus for a rate, lowest_cost if several kinds of GPUs have a price; without a rate "
        "max_tokens_per_gpu_hour.",
    )
    input_tokens: PositiveInt = Field(default=1024, description="Mean length of prompts.")
    output_tokens: int = Field(default=256, ge=2, description="Mean length of outputs.")
    length_deviation: float = Field(
        default=0.5, ge=0, le=4, description="Standard deviation of both, as a share of the mean."
    )
    cached_share: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the prompts' tokens that is found in the KV cache."
    )
    rate_per_s: PositiveFloat | None = Field(
        default=None, description="Requests a second, arriving at random. None: as many as one replica can serve."
    )
    headroom: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of what a replica can carry that the rate leaves free: predictions err, and loads vary.",
    )
    ttft_ms: PositiveFloat | None = Field(default=None, description="Limit of the time to the first token.")
    tpot_ms: PositiveFloat | None = Field(default=None, description="Limit of the time of each further token.")
    percentile: float = Field(default=95.0, ge=50, lt=100, description="Of the requests that have to meet each limit.")
    context_tokens: PositiveInt | None = Field(
        default=None, description="Longest prompt and output together. None: what the KV cache and the model hold."
    )
    max_gpus: PositiveInt | None = Field(default=None, description="GPUs that there are, of each kind.")

    @model_validator(mode="after")
    def _lengths_fit_the_context(self) -> Self:
        if self.context_tokens is not None and self.context_tokens < self.input_tokens + self.output_tokens:
            raise ValueError(
                f"context_tokens={self.context_tokens} is less than input_tokens={self.input_tokens} and "
                f"output_tokens={self.output_tokens} together; raise it"
            )
        return self

    @model_validator(mode="after")
    def _objective_has_what_it_needs(self) -> Self:
        needs_rate = (Objective.FEWEST_GPUS, Objective.LOWEST_COST)
        if self.objective in needs_rate and self.rate_per_s is None:
            raise ValueError(f"objective={self.objective.value} needs rate_per_s, the requests a second; give it")
        return self

    @property
    def computed_tokens(self) -> int:
        """Tokens of a prompt that are computed."""
        return max(1, round(self.input_tokens * (1.0 - self.cached_share)))

    @property
    def sequence_tokens(self) -> int:
        """Tokens whose keys and values a sequence has in the end."""
        return self.input_tokens + self.output_tokens

    def changed(self, **changes: Any) -> Self:
        """Return another goal.

        Raises:
            pydantic.ValidationError: It is none.
        """
        return type(self).model_validate({**self.model_dump(), **changes})


def read_goal(path: Path | None, given: dict[str, Any]) -> Goal:
    """Read a goal's file, of which `given` (what the command line says) replaces values.

    Raises:
        ConfigError: The file cannot be read, or something is wrong with a value; names it.
    """
    document = {} if path is None else read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a goal is a mapping such as `ttft_ms: 200`")
    try:
        return Goal.model_validate({**document, **given})
    except ValidationError as exc:
        raise ConfigError(describe_mistakes(exc, "goal" if path is None else f"{path}: ")) from None
